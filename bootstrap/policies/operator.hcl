# The Vault operator: watches tenants, refreshes and revokes, and decides where
# the service is. Reads no access token, and writes no secret. Registering and
# mounting the plugin takes more than this; see configure.sh.

# Who has which status.
path "kaizala/tenants" {
  capabilities = ["list"]
}

# Leases are the operator's to bound; the refresh token is the tenant user's.
path "kaizala/tenants/+" {
  capabilities = ["read", "update", "patch", "delete"]
  allowed_parameters = {
    "ttl"     = []
    "max_ttl" = []
    "min_ttl" = []
  }
}
path "kaizala/tenants/+/refresh" {
  capabilities = ["update"]
}

# Where refresh tokens are sent, and how many calls this mount may make. A
# connector is created by its owner: that takes its secret.
path "kaizala/config" {
  capabilities = ["list", "read", "update", "patch", "delete"]
  allowed_parameters = {
    "api_root"             = []
    "ca_cert"              = []
    "redirect_hosts"       = []
    "request_timeout"      = []
    "exchanges_per_minute" = []
  }
}
path "kaizala/config/+" {
  capabilities = ["read", "update", "patch", "delete"]
  allowed_parameters = {
    "api_root"             = []
    "ca_cert"              = []
    "redirect_hosts"       = []
    "request_timeout"      = []
    "exchanges_per_minute" = []
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
