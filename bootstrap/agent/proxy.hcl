# Vault Agent as a caching proxy: apps on this machine read creds/acme from it,
# without a Vault token of their own, and share one lease. Agent renews that
# lease, and reads anew when it cannot.
#
# Agent caches renewable leases only: give the tenant a ttl, such as 15m. With
# none, or with token/acme, each read goes to Vault, and works all the same.
#
# Run it in a directory that holds the AppRole's role-id and secret-id; apps read
# through the socket:
#
#   VAULT_ADDR=https://vault.example:8200 vault agent -config=proxy.hcl
#   VAULT_AGENT_ADDR=unix://$PWD/agent.sock vault read kaizala/creds/acme
#
# The AppRole needs the policy app.hcl.

auto_auth {
  method "approle" {
    config = {
      role_id_file_path                   = "role-id"
      secret_id_file_path                 = "secret-id"
      remove_secret_id_file_after_reading = false # Agent may have to start again
    }
  }
}

api_proxy {
  use_auto_auth_token = true
}

cache {
}

# A process that may open the socket reads access tokens.
listener "unix" {
  address      = "agent.sock"
  socket_mode  = "0600"
  tls_disable  = true
}
