variable "plugin_version" {
  description = "The plugin's version, as `vault-plugin-secrets-kaizala -version` prints it."
  type        = string
}

variable "plugin_sha256" {
  description = "SHA-256 sum of the plugin's binary, which lies in Vault's plugin_directory."
  type        = string
}

variable "plugin_command" {
  description = "File name of the plugin's binary in Vault's plugin_directory."
  type        = string
  default     = "vault-plugin-secrets-kaizala"
}

variable "plugin_pinned" {
  description = "The plugin's version is pinned in this Vault: the module then moves the pin, and gives the mount no version."
  type        = bool
  default     = false
}

variable "mount" {
  description = "Where the engine is mounted."
  type        = string
  default     = "kaizala"
}

variable "seal_wrap" {
  description = "Seal-wrap the engine's secrets: a feature of Vault Enterprise."
  type        = bool
  default     = false
}

variable "default_lease_ttl_seconds" {
  description = "Of the mount; Vault's own by default."
  type        = number
  default     = null
}

variable "max_lease_ttl_seconds" {
  description = "Of the mount; Vault's own by default."
  type        = number
  default     = null
}

variable "callbacks_per_minute" {
  description = "What one address may ask of the mount's callback, which needs no Vault token."
  type        = number
  default     = 60
}

# Of the secrets, Terraform keeps nothing: neither in the plan nor in the state.
# A version says that there is a new one, which is then written once. Leave
# connector_id null where the connector's owner writes the connector himself.

variable "connector" {
  description = "Name of the connector."
  type        = string
  default     = "default"
}

variable "connector_id" {
  description = "ID of the connector, at an OAuth 2.0 service the client ID; null: its owner writes it."
  type        = string
  default     = null
}

variable "connector_secret" {
  description = "The connector's secret. Needed when connector_secret_version or another setting of the connector changes, and at no other time. An OAuth 2.0 connector keeps the secret that it has where this is null."
  type        = string
  default     = null
  ephemeral   = true
  sensitive   = true
}

variable "connector_secret_version" {
  description = "Any number; another one writes connector_secret."
  type        = number
  default     = 1
}

variable "connector_settings" {
  description = "What else is written with it, the Vault operator's to decide. For an OAuth 2.0 service: jsondecode(file(\"bootstrap/services/google.json\")), say."
  type        = any
  default     = {}
}

variable "tenants" {
  description = "Tenants by name. Without a refresh_token_version the tenant user writes the refresh token himself, and the settings too."
  type = map(object({
    refresh_token_version = optional(number)
    settings              = optional(map(string), {})
  }))
  default = {}
}

variable "refresh_tokens" {
  description = "Refresh tokens by tenant. A tenant's is needed when its refresh_token_version or its settings change, and at no other time."
  type        = map(string)
  default     = {}
  ephemeral   = true
  sensitive   = true
}

variable "approle_mount" {
  description = "Where AppRole auth is mounted. Each tenant's app gets a role there; null: none."
  type        = string
  default     = "approle"
}
