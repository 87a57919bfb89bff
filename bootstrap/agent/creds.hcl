# Vault Agent beside an app, with a lease: keeps the file access-token.json
# current, from creds/acme. For apps whose access has to be revocable by Vault.
#
# Run it in a directory that holds the AppRole's role-id and secret-id:
#
#   VAULT_ADDR=https://vault.example:8200 vault agent -config=creds.hcl
#
# The AppRole needs the policy app.hcl. Give the tenant a ttl, such as 15m: then
# Agent renews the lease, and notices a revocation within two thirds of that.
# Without one it looks again only towards the access token's end.
#
# endpoint_url is null where the service names none.

auto_auth {
  method "approle" {
    config = {
      role_id_file_path                   = "role-id"
      secret_id_file_path                 = "secret-id"
      remove_secret_id_file_after_reading = false # Agent may have to start again
    }
  }
}

template {
  destination          = "access-token.json"
  perms                = "0600"
  error_on_missing_key = true
  contents             = <<-EOT
    {{- with secret "kaizala/creds/acme" }}
    {
      "access_token": {{ .Data.access_token | toJSON }},
      "endpoint_url": {{ index .Data "endpoint_url" | toJSON }},
      "expire_time": {{ .Data.expire_time | toJSON }}
    }
    {{- end }}
  EOT
}
