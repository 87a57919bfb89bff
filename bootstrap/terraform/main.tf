resource "vault_plugin" "kaizala" {
  type    = "secret"
  name    = "vault-plugin-secrets-kaizala"
  command = var.plugin_command
  version = var.plugin_version
  sha256  = var.plugin_sha256

  # Vault refuses to remove a version that is pinned, and a mount needs its own
  # until it has the next.
  lifecycle {
    create_before_destroy = true
  }
}

# While a version is pinned, Vault runs that one, and refuses a mount's own.
resource "vault_plugin_pinned_version" "kaizala" {
  count = var.plugin_pinned ? 1 : 0

  type    = vault_plugin.kaizala.type
  name    = vault_plugin.kaizala.name
  version = vault_plugin.kaizala.version
}

resource "vault_mount" "kaizala" {
  path                      = var.mount
  type                      = vault_plugin.kaizala.name
  plugin_version            = var.plugin_pinned ? null : vault_plugin.kaizala.version # at first; then "version" below
  description               = "Access tokens of OAuth 2.0 services and of Kaizala"
  seal_wrap                 = var.seal_wrap
  default_lease_ttl_seconds = var.default_lease_ttl_seconds
  max_lease_ttl_seconds     = var.max_lease_ttl_seconds

  # What audit logs may show in clear, as in configure.sh. authorization_url is in the requests alone: in the answer of
  # tenants/NAME/authorize it holds a state that is still valid.
  audit_non_hmac_request_keys = [
    "service", "connector_id", "ca_cert", "request_timeout", "exchanges_per_minute", "api_root", "redirect_hosts",
    "issuer", "token_url", "revocation_url", "authorization_url", "device_authorization_url", "token_endpoint_auth_method",
    "scopes", "redirect_uris", "redirect_uri", "endpoint_url_field", "access_token_life", "refresh_token_life", "keep_alive",
    "exchange_invalidates", "revocation", "revoke_on_delete", "confirm",
    "connector", "ttl", "max_ttl", "min_ttl", "retire_on_revoke", "token_per_lease", "verify",
  ]
  audit_non_hmac_response_keys = [
    "endpoint_url", "scope", "token_type", "expire_time", "tenant", "rotation_period", "last_vault_rotation",
    "service", "connector_id", "ca_cert", "request_timeout", "exchanges_per_minute", "api_root", "redirect_hosts",
    "issuer", "token_url", "revocation_url", "device_authorization_url", "token_endpoint_auth_method",
    "scopes", "redirect_uris", "endpoint_url_field", "access_token_life", "refresh_token_life", "keep_alive",
    "exchange_invalidates", "revocation", "revoke_on_delete", "confirm",
    "connector", "ttl", "max_ttl", "min_ttl", "retire_on_revoke", "token_per_lease", "status", "kind", "group_id", "granted_time", "granted_by",
    "refresh_token_expire_time", "refresh_token_set_time", "refresh_token_origin",
    "access_token_expire_time", "last_exchange_time", "next_exchange_time",
    "last_error", "last_error_time", "pending_revocations", "last_revocation_error", "keys", "key_info",
  ]

  # Vault never takes a mount's version away, so a pin that comes later must not
  # have the provider try.
  lifecycle {
    ignore_changes = [plugin_version]
  }

  depends_on = [vault_plugin_pinned_version.kaizala]
}

# The version that the mount runs from its next reload on.
resource "vault_generic_endpoint" "version" {
  count = var.plugin_pinned ? 0 : 1

  path                 = "sys/mounts/${vault_mount.kaizala.path}/tune"
  data_json            = jsonencode({ plugin_version = vault_plugin.kaizala.version })
  ignore_absent_fields = true
  disable_delete       = true

  depends_on = [vault_plugin_pinned_version.kaizala]
}

# A request for callback needs no token, and costs a storage read.
resource "vault_quota_rate_limit" "callback" {
  name     = "${module.policies.prefix}-callback"
  path     = "${vault_mount.kaizala.path}/callback*"
  rate     = var.callbacks_per_minute
  interval = 60
}

module "policies" {
  source  = "./policies"
  mount   = var.mount
  tenants = keys(var.tenants)
}

# Vault overwrites a policy without an error, and ignores case in its name. Names are made of mounts and tenants, so those of
# kaizala-app may be those of kaizala's too, and of teams/kaizala and teams-kaizala they are the same.
data "vault_generic_secret" "policies" {
  path = "sys/policy"
}

locals {
  names   = { for name in keys(module.policies.policies) : lower(name) => name }
  present = nonsensitive(jsondecode(data.vault_generic_secret.policies.data_json).keys)
}

# Of a policy that is not there, the list again: which are there may be known at the apply alone.
data "vault_generic_secret" "policy" {
  for_each = local.names

  path = contains(local.present, each.key) ? "sys/policies/acl/${each.key}" : "sys/policy"
}

resource "vault_policy" "kaizala" {
  for_each = module.policies.policies

  name   = each.key
  policy = each.value

  lifecycle {
    precondition {
      condition = strcontains(
        lookup(nonsensitive(data.vault_generic_secret.policy[lower(each.key)].data), "policy", each.value),
        regex("path \"[^\"]*\"", each.value)
      )
      error_message = "The policy ${each.key} is there for something else, since it has no ${regex("path \"[^\"]*\"", each.value)}: choose another mount path or tenant name, or delete that policy if nobody uses it."
    }
  }
}

module "connector" {
  source = "./secret"
  count  = var.connector_id == null ? 0 : 1

  path           = "${vault_mount.kaizala.path}/config${var.connector == "default" ? "" : "/${var.connector}"}"
  settings       = merge(var.connector_settings, { connector_id = var.connector_id })
  field          = "connector_secret"
  secret         = var.connector_secret
  secret_version = var.connector_secret_version
}

module "tenant" {
  source   = "./secret"
  for_each = { for name, tenant in var.tenants : name => tenant if tenant.refresh_token_version != null }

  path           = "${vault_mount.kaizala.path}/tenants/${each.key}"
  settings       = each.value.settings
  field          = "refresh_token"
  secret         = lookup(var.refresh_tokens, each.key, null)
  secret_version = each.value.refresh_token_version

  depends_on = [module.connector]
}

# An app logs in with its role and a secret ID, which is made outside of
# Terraform so that it is in no state:
#
#   vault write -f -wrap-ttl=5m auth/approle/role/kaizala-acme/secret-id
resource "vault_approle_auth_backend_role" "app" {
  for_each = var.approle_mount == null ? {} : var.tenants

  backend   = var.approle_mount
  role_name = "${module.policies.prefix}-${each.key}"
  token_policies = [
    vault_policy.kaizala["${module.policies.prefix}-app-${each.key}"].name,
    vault_policy.kaizala["${module.policies.prefix}-sidecar-${each.key}"].name,
  ]
  token_ttl          = 3600
  secret_id_num_uses = 0
}
