# Writes a path of the engine that takes a secret. The provider's
# vault_generic_endpoint would keep the secret in the state, for it has no
# write-only argument; here it goes from an ephemeral variable through the
# environment of one shell to vault's standard input.
#
# Needs the vault command where Terraform runs, with VAULT_ADDR and VAULT_TOKEN.

terraform {
  required_version = ">= 1.10"
}

variable "path" {
  type = string
}

variable "settings" {
  description = "Fields that are no secret."
  type        = any
  default     = {}
}

variable "field" {
  description = "Name of the secret field."
  type        = string
}

variable "secret" {
  type      = string
  ephemeral = true
  sensitive = true
}

variable "secret_version" {
  type = number
}

# Destroying it deletes nothing: a connector in use could not be deleted, and a
# tenant would lose its refresh token. Unmounting the engine deletes all.
resource "terraform_data" "write" {
  triggers_replace = [var.path, var.settings, var.field, var.secret_version]

  provisioner "local-exec" {
    command = "printf %s \"$DATA\" | vault write \"$TARGET\" - >/dev/null"
    # A connector of OAuth 2.0 keeps the secret that it has where none is given: null would take it away. Elsewhere the
    # engine refuses the null, and with it the write.
    environment = {
      TARGET = var.path
      DATA = jsonencode(merge(var.settings, {
        for secret in [var.secret] : (var.field) => secret
        if secret != null || try(var.settings.service, "") != "oauth2"
      }))
    }
  }
}
