package vaulttest

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestPathHelp(t *testing.T) {
	v := Start(t)
	v.MountEngine(t, "kaizala")
	for path, synopsis := range map[string]string{
		"":                       "This secrets engine keeps refresh tokens",
		"config":                 "The default connector: how the engine reaches a token service.",
		"config/hr":              "The connector: how the engine reaches a token service.",
		"tenants":                "List the tenants, with the status of each.",
		"tenants/acme":           "A tenant's refresh token, which cannot be read back, and its settings.",
		"tenants/acme/refresh":   "Exchange a tenant's refresh token now, and retire its access token.",
		"tenants/acme/authorize": "Get a tenant's refresh token by a person's consent in a browser.",
		"tenants/acme/device":    "Get a tenant's refresh token by a code that a person enters on another device.",
		"tenants/acme/pin":       "Get a tenant's refresh token by a PIN that comes by SMS.",
		"callback":               "The address to which the service sends a person's browser back.",
		"callback/hr":            "The address to which the service sends a person's browser back.",
		"creds/acme":             "Read a leased access token of a tenant.",
		"token/acme":             "Read an access token of a tenant without a lease.",
	} {
		out, exit := v.CLI(t, v.RootToken, "path-help", "kaizala/"+path)
		require.Zero(t, exit, "%s: %s", path, out)
		assert.Contains(t, out, synopsis, path)
		assert.NotContains(t, out, "<no ", path)
	}
}
