package vaulttest

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// The statements of SECURITY.md about an attacker who has Vault's storage.
func TestWhatStorageHolds(t *testing.T) {
	t.Parallel()
	s := newSite(t, Raft(), WithConfig(func(config map[string]any) { config["raw_storage_endpoint"] = true }))
	s.configure(t, nil)
	s.tenant(t, "acme", map[string]any{"ttl": "1h"})
	refresh := s.kaizala.CurrentRefreshToken("acme")
	secret, err := s.Client.Logical().Read("kaizala/creds/acme")
	require.NoError(t, err)
	access := secret.Data["access_token"].(string)

	// With the unseal keys, shown here with sys/raw, the attacker can read the lease
	// entry, which has the access token until the lease is renewed.
	lease := "sys/raw/sys/expire/id/" + secret.LeaseID
	holds := func() []string {
		return secretsIn(s.read(t, lease)["value"].(string), refresh, access, s.connectorSecret)
	}
	require.Equal(t, []string{access}, holds())
	_, err = s.Client.Sys().Renew(secret.LeaseID, 0)
	require.NoError(t, err)
	require.Empty(t, holds())
	require.NoError(t, s.Client.Sys().Revoke(secret.LeaseID))
	gone, err := s.Client.Logical().Read(lease)
	if err == nil {
		require.Nil(t, gone)
	} else {
		require.ErrorContains(t, err, "404")
	}
	_ = s.read(t, "kaizala/token/acme")
	leases, err := s.Client.Logical().List("sys/leases/lookup/kaizala/")
	require.NoError(t, err)
	require.Nil(t, leases, "a read of token makes no lease")

	// Without the keys the attacker can read nothing.
	s.Stop()
	files := 0
	err = filepath.WalkDir(filepath.Join(s.Dir, "data"), func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		files++
		text, err := os.ReadFile(path)
		require.Empty(t, secretsIn(string(text), refresh, access, s.connectorSecret), path)
		return err
	})
	require.NoError(t, err)
	require.Positive(t, files)
}
