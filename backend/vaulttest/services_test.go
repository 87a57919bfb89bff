package vaulttest

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Each recipe is written to a real Vault as its page says, and read back. None of these writes makes a call.
func TestServiceRecipesOnVault(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	files := glob(t, bootstrapFile(t, "services", "*.json"))
	require.Len(t, files, 16)
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".json")
		for _, write := range [][]string{{"@" + file}, {"connector_id=an-id", "connector_secret=a-secret"}} {
			out, status := s.CLI(t, s.RootToken, append([]string{"write", "kaizala/config/" + name}, write...)...)
			require.Zero(t, status, out)
		}
		raw, err := os.ReadFile(file)
		require.NoError(t, err)
		want := map[string]any{}
		require.NoError(t, json.Unmarshal(raw, &want))
		shown := s.read(t, "kaizala/config/"+name)
		for field, value := range want {
			if text, ok := value.(string); ok && !strings.HasSuffix(field, "_life") && field != "keep_alive" {
				assert.Equal(t, text, shown[field], "%s of %s", field, name)
			}
			assert.Contains(t, shown, field, name)
		}
		assert.Equal(t, "an-id", shown["connector_id"])
		assert.NotContains(t, shown, "connector_secret")
	}
}
