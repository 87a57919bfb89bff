# The Vault operator: watches tenants, refreshes and revokes, creates connectors of OAuth 2.0 services, and decides where
# every service is. Reads no access token, and writes no secret. Registering and mounting the plugin takes more than this;
# see configure.sh.

# The statuses of all tenants.
path "kaizala/tenants" {
  capabilities = ["list"]
}

# Leases, and what their end does, are the operator's to decide; the refresh token is the tenant user's.
path "kaizala/tenants/+" {
  capabilities = ["read", "update", "patch", "delete"]
  allowed_parameters = {
    "ttl"              = []
    "max_ttl"          = []
    "min_ttl"          = []
    "retire_on_revoke" = []
    "token_per_lease"  = []
  }
}
path "kaizala/tenants/+/refresh" {
  capabilities = ["update"]
}

# Where refresh tokens are sent, what is done with them, and how many calls this mount may make. A Kaizala connector is
# created by its owner: that takes its secret.
path "kaizala/config" {
  capabilities = ["list", "create", "read", "update", "patch", "delete"]
  allowed_parameters = {
    "service"              = []
    "ca_cert"              = []
    "request_timeout"      = []
    "exchanges_per_minute" = []

    # Kaizala
    "api_root"       = []
    "redirect_hosts" = []

    # OAuth 2.0
    "issuer"                     = []
    "token_url"                  = []
    "revocation_url"             = []
    "authorization_url"          = []
    "device_authorization_url"   = []
    "token_endpoint_auth_method" = []
    "token_params"               = []
    "authorization_params"       = []
    "scopes"                     = []
    "redirect_uris"              = []
    "endpoint_url_field"         = []
    "access_token_life"          = []
    "refresh_token_life"         = []
    "keep_alive"                 = []
    "exchange_invalidates"       = []
    "revocation"                 = []
    "revoke_on_delete"           = []
    "confirm"                    = []
  }
}
path "kaizala/config/+" {
  capabilities = ["create", "read", "update", "patch", "delete"]
  allowed_parameters = {
    "service"              = []
    "ca_cert"              = []
    "request_timeout"      = []
    "exchanges_per_minute" = []

    # Kaizala
    "api_root"       = []
    "redirect_hosts" = []

    # OAuth 2.0
    "issuer"                     = []
    "token_url"                  = []
    "revocation_url"             = []
    "authorization_url"          = []
    "device_authorization_url"   = []
    "token_endpoint_auth_method" = []
    "token_params"               = []
    "authorization_params"       = []
    "scopes"                     = []
    "redirect_uris"              = []
    "endpoint_url_field"         = []
    "access_token_life"          = []
    "refresh_token_life"         = []
    "keep_alive"                 = []
    "exchange_invalidates"       = []
    "revocation"                 = []
    "revoke_on_delete"           = []
    "confirm"                    = []
  }
}

# Leases: look up, count and revoke them, one or all of a tenant.
path "sys/leases/lookup/kaizala/*" {
  capabilities = ["list", "sudo"]
}
path "sys/leases/lookup" {
  capabilities = ["update"]
}
path "sys/leases/count" {
  capabilities = ["read", "sudo"]
}
path "sys/leases/revoke/kaizala/*" {
  capabilities = ["update"]
}
path "sys/leases/revoke-prefix/kaizala/*" {
  capabilities = ["update", "sudo"]
}

path "sys/metrics" {
  capabilities = ["read"]
}
