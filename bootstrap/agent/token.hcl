# Vault Agent beside an app: keeps the file access-token.json current, from
# token/acme, which leaves no lease behind. The right choice for most apps.
#
# Run it in a directory that holds the AppRole's role-id and secret-id:
#
#   VAULT_ADDR=https://vault.example:8200 vault agent -config=token.hcl
#
# The AppRole needs the policy sidecar.hcl. endpoint_url is null where the service names none.

auto_auth {
  method "approle" {
    config = {
      role_id_file_path                   = "role-id"
      secret_id_file_path                 = "secret-id"
      remove_secret_id_file_after_reading = false # Agent may have to start again
    }
  }
}

# Agent reads again when the answer's ttl has passed: by then the engine is sure
# to have a newer access token, and the old one still lives for min_ttl.
template {
  destination          = "access-token.json"
  perms                = "0600"
  error_on_missing_key = true
  contents             = <<-EOT
    {{- with secret "kaizala/token/acme" }}
    {
      "access_token": {{ .Data.access_token | toJSON }},
      "endpoint_url": {{ index .Data "endpoint_url" | toJSON }},
      "expire_time": {{ .Data.expire_time | toJSON }}
    }
    {{- end }}
  EOT
}
