package kaizala

import (
	"net/url"
	"strings"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// The calls' paths below the api root (doc).
const (
	exchangePath  = "/v1/accessToken"
	sendPINPath   = "/v1/generatePin"
	redeemPINPath = "/v1/loginWithPinAndApplicationId"
)

// parseRoot parses an api root, to whose path a call's can be joined.
func parseRoot(raw string) (*url.URL, tokenservice.Host, string) {
	u, h, problem := tokenservice.ParseTarget(raw)
	if problem != "" {
		return nil, tokenservice.Host{}, problem + "; give one such as " + DefaultAPIRoot
	}
	if strings.ContainsAny(raw, "?#") {
		return nil, tokenservice.Host{}, "must have no query and no fragment; give a URL such as " + DefaultAPIRoot
	}
	if u.Path == "" {
		u.Path = "/" // what JoinPath joins to nothing is relative
	}
	return u, h, ""
}

// parseDomain returns a redirect host in the form in which hosts are compared.
func parseDomain(raw string) (string, string) {
	const right = "must be domain names without scheme, port, path or *, such as kaiza.la; each stands for its subdomains too"
	h, ok := tokenservice.ParseHost(raw)
	if !ok || h.IsAddress() {
		return "", right
	}
	return h.String(), ""
}

// withExchangePath completes a URL that names a base alone. Kaizala's documentation says that Location holds the new
// endpoint, and not whether it repeats the call's path (guess): a path is taken as the whole call's, no path as the
// base.
func withExchangePath(u *url.URL) *url.URL {
	whole := *u
	whole.Fragment, whole.RawFragment = "", ""
	if whole.Path == "" || whole.Path == "/" {
		whole.Path, whole.RawPath = exchangePath, ""
	}
	return &whole
}

// permitted says why the secrets may not travel on from one URL to another, or "" where they may.
func (x *exchange) permitted(from, to *url.URL) string {
	h, problem := tokenservice.CheckTarget(to)
	switch {
	case problem != "":
		return "Its address " + problem + "."
	case from.Scheme == "https" && to.Scheme != "https":
		return "It leads from https to http, which is never followed."
	case h == x.rootHost:
		return ""
	}
	for _, domain := range x.redirectHosts {
		if h.Within(domain) {
			return ""
		}
	}
	return "If " + x.nameHost(h.String()) + " is Kaizala's, the operator can add it to redirect_hosts."
}
