# A sidecar, a gateway or an operator of Kubernetes that reads often: access
# tokens without a lease, so that nothing piles up in Vault.
path "kaizala/token/acme" {
  capabilities = ["read"]
}
