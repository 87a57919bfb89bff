# The connector owner: the procedure's developer, who registers the connector with Kaizala, or the client at an OAuth 2.0
# service. Writes its ID and secret, and no other field: whoever may write a URL of the service, redirect_hosts or ca_cert
# decides where refresh tokens are sent.
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
