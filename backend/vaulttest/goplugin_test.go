package vaulttest

import (
	"context"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"
)

func TestDispense(t *testing.T) {
	storage := &logical.InmemStorage{}
	mount := Dispense(t, PluginBinary(t), storage, logical.TestSystemView())
	require.Equal(t, logical.TypeLogical, mount.Type())

	resp, err := mount.HandleRequest(context.Background(), &logical.Request{
		Operation: logical.HelpOperation,
		Path:      "config",
		Storage:   storage,
	})
	require.NoError(t, err)
	require.NotEmpty(t, resp.Data["help"])
}
