# The connector owner: the procedure's developer, who registers the connector
# with Kaizala. Writes its ID and secret, and no other field: whoever may write
# api_root, redirect_hosts or ca_cert decides where refresh tokens are sent.
path "kaizala/config" {
  capabilities = ["create", "update"]
  allowed_parameters = {
    "connector_id"     = []
    "connector_secret" = []
  }
}

# The same connector by its name. The owner of another one has config/<name>.
path "kaizala/config/default" {
  capabilities = ["create", "update"]
  allowed_parameters = {
    "connector_id"     = []
    "connector_secret" = []
  }
}
