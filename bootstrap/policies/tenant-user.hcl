# The tenant user: who grants access, or an administrator of the groups who generates the tenant's refresh token. Writes it
# and reads its status, which holds no secret. What the end of a lease does (token_per_lease, retire_on_revoke) is the
# operator's to decide.
path "kaizala/tenants/acme" {
  capabilities = ["create", "update", "patch", "read"]
  allowed_parameters = {
    "refresh_token" = []
    "connector"     = []
    "ttl"           = []
    "max_ttl"       = []
    "min_ttl"       = []
    "verify"        = []
  }
}
