# One policy for the apps of all tenants: the app's entity says in its metadata
# whose tokens it reads. An entity without that metadata reads none. A person who
# may write entities decides who reads what. Vault takes a * or + in the metadata
# for a wildcard: such an entity reads the tokens of several tenants, or of all.
path "kaizala/creds/{{identity.entity.metadata.tenant}}" {
  capabilities = ["read"]
}

path "sys/leases/renew" {
  capabilities = ["update"]
}

path "sys/leases/revoke/kaizala/creds/{{identity.entity.metadata.tenant}}/*" {
  capabilities = ["update"]
}
path "sys/leases/revoke" {
  capabilities = ["update"]
}
