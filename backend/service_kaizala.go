package backend

import (
	"context"
	"net/http"
	"slices"
	"strings"

	"github.com/hashicorp/vault/sdk/framework"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// maxRedirectHosts bounds redirect_hosts in a write. What an older version has stored is used as it is.
const maxRedirectHosts = 100

// kaizalaKind is Microsoft Kaizala.
var kaizalaKind = serviceKind{
	fields: map[string]*framework.FieldSchema{
		"api_root": {
			Type:        framework.TypeString,
			Default:     kaizala.DefaultAPIRoot,
			Description: "Kaizala only: where Kaizala is, an https URL, or plain http on a loopback address. It decides where refresh tokens are sent.",
		},
		"redirect_hosts": {
			Type:        framework.TypeCommaStringSlice,
			Default:     kaizala.DefaultRedirectHosts,
			Description: "Kaizala only: domains that Kaizala may move a tenant's exchanges to, with their subdomains. api_root's own host is always among them.",
		},
	},
	settings: func() serviceSettings {
		return &kaizalaSettings{APIRoot: kaizala.DefaultAPIRoot, RedirectHosts: slices.Clone(kaizala.DefaultRedirectHosts)}
	},
	requestTimeout: kaizala.DefaultRequestTimeout,
}

type kaizalaSettings struct {
	APIRoot       string   `json:"api_root"`
	RedirectHosts []string `json:"redirect_hosts"`
}

func (s *kaizalaSettings) set(d *framework.FieldData, name string) error {
	isNull := d.Raw[name] == nil
	switch name {
	case "api_root":
		s.APIRoot = strings.TrimSpace(d.Get(name).(string))
		if isNull {
			s.APIRoot = kaizala.DefaultAPIRoot
		}
	case "redirect_hosts":
		s.RedirectHosts = d.Get(name).([]string)
		if isNull {
			s.RedirectHosts = slices.Clone(kaizala.DefaultRedirectHosts)
		}
		if len(s.RedirectHosts) > maxRedirectHosts {
			return badValue("redirect_hosts must name %d hosts at most", maxRedirectHosts)
		}
	}
	return nil
}

func (s *kaizalaSettings) show(data map[string]any) {
	data["api_root"], data["redirect_hosts"] = s.APIRoot, s.RedirectHosts
}

func (s *kaizalaSettings) check(c *connectorEntry) error {
	switch {
	case c.ConnectorID == "":
		return badValue("connector_id is required: give the ID that Kaizala's portal shows for the connector; for an OAuth 2.0 service, give service=oauth2 too")
	case c.ConnectorSecret == "":
		return badValue("connector_secret is required: give the secret that Kaizala's portal shows for the connector")
	case s.APIRoot == "":
		return badValue("api_root is empty: give an https URL, or leave it out for %s", kaizala.DefaultAPIRoot)
	}
	return nil
}

func (*kaizalaSettings) missing(*connectorEntry, string) error { return nil }

func (*kaizalaSettings) discover(context.Context, *connectorEntry, *framework.FieldData, http.RoundTripper, tokenservice.Permit) error {
	return nil
}

func (*kaizalaSettings) take(serviceSettings) {}

func (s *kaizalaSettings) client(c *connectorEntry, transport http.RoundTripper) (tokenservice.Service, error) {
	client, err := kaizala.New(kaizala.Config{
		ConnectorID:     c.ConnectorID,
		ConnectorSecret: c.ConnectorSecret,
		APIRoot:         s.APIRoot,
		CACert:          c.CACert,
		RedirectHosts:   s.RedirectHosts,
		RequestTimeout:  c.RequestTimeout,
		Transport:       transport,
	})
	if err != nil {
		return nil, err
	}
	return client, nil
}

func (*kaizalaSettings) isAt(string) bool { return false }

func (s *kaizalaSettings) address() string { return s.APIRoot }

func (s *kaizalaSettings) clone() serviceSettings {
	next := *s
	return &next
}
