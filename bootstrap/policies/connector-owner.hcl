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
