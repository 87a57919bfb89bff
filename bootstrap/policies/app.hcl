# The app: reads access tokens, and keeps or gives up the leases on them.
path "kaizala/creds/acme" {
  capabilities = ["read"]
}

# Vault's default policy allows the renewal already; this names it for tokens
# that are made without that policy.
path "sys/leases/renew" {
  capabilities = ["update"]
}

# To revoke takes a lease ID, which the reader of the lease knows. The command
# line sends it in the path, and some API clients in the body.
path "sys/leases/revoke/kaizala/creds/acme/*" {
  capabilities = ["update"]
}
path "sys/leases/revoke" {
  capabilities = ["update"]
}
