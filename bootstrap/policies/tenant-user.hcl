# The tenant user: an administrator of the groups, who generates the tenant's
# refresh token. Writes it and reads its status, which holds no secret.
path "kaizala/tenants/acme" {
  capabilities = ["create", "update", "patch", "read"]
}
