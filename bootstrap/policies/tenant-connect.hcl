# A tenant user who connects the tenant by his consent, and holds no refresh
# token. He starts and watches authorize, device or pin, and reads nothing else.
# callback is not here: it needs no Vault token.
path "kaizala/tenants/acme/authorize" {
  capabilities = ["update", "read"]
}
path "kaizala/tenants/acme/device" {
  capabilities = ["update", "read"]
}

# Kaizala's login by a PIN that comes by SMS.
path "kaizala/tenants/acme/pin" {
  capabilities = ["update"]
}
