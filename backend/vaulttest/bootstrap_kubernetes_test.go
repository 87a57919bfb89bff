package vaulttest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"text/template"
	"time"

	"github.com/stretchr/testify/require"
	"gopkg.in/yaml.v3"
)

// manifest is the part of a Kubernetes object that the tests read.
type manifest struct {
	APIVersion string `yaml:"apiVersion"`
	Kind       string
	Metadata   struct{ Name, Namespace string }
	Spec       struct {
		VaultConnectionRef string `yaml:"vaultConnectionRef"`
		VaultAuthRef       string `yaml:"vaultAuthRef"`
		Mount, Path        string
		AllowStaticCreds   bool `yaml:"allowStaticCreds"`
		RenewalPercent     int  `yaml:"renewalPercent"`
		Revoke             bool
		Kubernetes         struct {
			ServiceAccount string `yaml:"serviceAccount"`
		}
		Destination struct {
			Name           string
			Transformation struct {
				Templates map[string]struct{ Text string }
			}
		}
	}
}

func (m manifest) id() string { return m.Kind + "/" + m.Metadata.Namespace + "/" + m.Metadata.Name }

func manifests(t *testing.T) (all []manifest) {
	t.Helper()
	for _, path := range glob(t, bootstrapFile(t, "kubernetes", "*.yaml")) {
		file, err := os.Open(path)
		require.NoError(t, err)
		defer file.Close()
		for documents := yaml.NewDecoder(file); ; {
			var m manifest
			err := documents.Decode(&m)
			if errors.Is(err, io.EOF) {
				break
			}
			require.NoError(t, err, path)
			all = append(all, m)
		}
	}
	return all
}

// The tests have no Kubernetes. They check that the manifests refer to one another,
// that their policies permit their reads, and that the answers have the fields that
// the manifests and the Vault Secrets Operator use.
func TestKubernetesManifests(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.configure(t, nil)
	s.tenant(t, "acme", map[string]any{"ttl": "15m"})
	s.shippedPolicy(t, "app")
	s.shippedPolicy(t, "sidecar")
	client := s.ClientFor(t, s.TokenWith(t, "app", "sidecar"))

	all := manifests(t)
	there := map[string]bool{}
	for _, m := range all {
		there[m.id()] = true
	}
	paths := map[string]bool{}
	for _, m := range all {
		in := m.Metadata.Namespace
		switch m.Kind {
		case "VaultAuth":
			require.True(t, there["VaultConnection/"+in+"/"+m.Spec.VaultConnectionRef], m.id())
			require.True(t, there["ServiceAccount/"+in+"/"+m.Spec.Kubernetes.ServiceAccount], m.id())
		case "VaultDynamicSecret":
			require.True(t, there["VaultAuth/"+in+"/"+m.Spec.VaultAuthRef], m.id())
			require.NotEmpty(t, m.Spec.Destination.Name)
			secret, err := client.Logical().Read(m.Spec.Mount + "/" + m.Spec.Path)
			require.NoError(t, err, m.id())
			paths[strings.Split(m.Spec.Path, "/")[0]] = true

			values := map[string]string{}
			for name, tmpl := range m.Spec.Destination.Transformation.Templates {
				values[name] = render(t, tmpl.Text, secret.Data)
			}
			require.Equal(t, secret.Data["access_token"], values["accessToken"])
			require.Equal(t, secret.Data["endpoint_url"], values["endpointUrl"])
			require.Equal(t, secret.Data["expire_time"], values["expireTime"])

			if m.Spec.AllowStaticCreds {
				require.Empty(t, secret.LeaseID, "a lease takes precedence over the fields of a static one")
				last, err := time.Parse(time.RFC3339Nano, secret.Data["last_vault_rotation"].(string))
				require.NoError(t, err)
				require.Positive(t, last.Unix())
				period, err := secret.Data["rotation_period"].(json.Number).Int64()
				require.NoError(t, err)
				require.GreaterOrEqual(t, period, int64(1))
				ttl, err := secret.Data["ttl"].(json.Number).Int64()
				require.NoError(t, err)
				require.Greater(t, ttl, int64(2), "with a ttl of 2 or less the operator reads again at once")
				require.NotContains(t, secret.Data, "rotation_schedule")
			} else {
				require.NotEmpty(t, secret.LeaseID)
				require.True(t, secret.Renewable)
				require.True(t, m.Spec.Revoke)
				require.Equal(t, 67, m.Spec.RenewalPercent)
			}
		}
	}
	require.Equal(t, map[string]bool{"creds": true, "token": true}, paths)
}

// render executes a template as the operator does, except that a missing field is an
// error here.
func render(t *testing.T, text string, data map[string]any) string {
	t.Helper()
	tmpl, err := template.New("").Funcs(template.FuncMap{
		"get": func(from map[string]any, name string) (any, error) {
			if value, ok := from[name]; ok {
				return value, nil
			}
			return nil, fmt.Errorf("there is no field %q", name)
		},
	}).Parse(text)
	require.NoError(t, err)
	var out strings.Builder
	require.NoError(t, tmpl.Execute(&out, map[string]any{"Secrets": data}))
	return out.String()
}
