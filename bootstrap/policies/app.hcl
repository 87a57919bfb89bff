# The app: reads access tokens, and keeps or gives up the leases on them.
path "kaizala/creds/acme" {
  capabilities = ["read"]
}

# Vault's default policy allows the renewal already; this names it for tokens
# that are made without that policy.
path "sys/leases/renew" {
  capabilities = ["update"]
}

# A lease ID is needed to revoke, and only the reader of a lease knows it.
path "sys/leases/revoke" {
  capabilities = ["update"]
}
