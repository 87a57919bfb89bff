# A monitoring system: sees the status of tenants and connectors, pending revocations, and Vault's metrics. Reads no token,
# and changes nothing.
path "kaizala/tenants" {
  capabilities = ["list"]
}
path "kaizala/tenants/+" {
  capabilities = ["read"]
}
path "kaizala/config" {
  capabilities = ["list", "read"]
}
path "kaizala/config/+" {
  capabilities = ["read"]
}

path "sys/leases/count" {
  capabilities = ["read", "sudo"]
}
path "sys/metrics" {
  capabilities = ["read"]
}
