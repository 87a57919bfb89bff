# The connector owner, who registers the connector with Kaizala, or the client at an OAuth 2.0 service. Writes its ID and secret,
# and no other field: a URL of the service, redirect_hosts and ca_cert decide where refresh tokens are sent.
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
