package kaizala

import (
	"net/netip"
	"net/url"
	"strconv"
	"strings"
)

// callPath is the exchange's path below the api root (doc).
const callPath = "/v1/accessToken"

// maxURLBytes bounds a URL that the service sends, since it is remembered or handed to apps.
const maxURLBytes = 2048

// host is a URL's host name in the one form in which hosts are compared: lower case, no trailing dot, and the address
// where it is an IP literal.
type host struct {
	name string
	ip   netip.Addr
}

// parseHost refuses whatever different parts of a system may read differently: non-ASCII names, IPv6 zones, and
// names that some resolvers take for an address, such as 127.1 or 0x7f000001.
func parseHost(raw string) (host, bool) {
	if ip, err := netip.ParseAddr(raw); err == nil {
		if ip.Zone() != "" {
			return host{}, false
		}
		ip = ip.Unmap()
		return host{name: ip.String(), ip: ip}, true
	}
	name := strings.ToLower(strings.TrimSuffix(raw, "."))
	if name == "" || len(name) > 253 {
		return host{}, false
	}
	labels := strings.Split(name, ".")
	for _, label := range labels {
		if label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return host{}, false
		}
	}
	last := labels[len(labels)-1]
	if strings.Trim(last, "0123456789") == "" || strings.HasPrefix(last, "0x") {
		return host{}, false
	}
	return host{name: name}, true
}

func (h host) loopback() bool {
	if h.ip.IsValid() {
		return h.ip.IsLoopback()
	}
	return h.name == "localhost"
}

// within says whether h is the domain or lies below it. An address lies below nothing.
func (h host) within(domain string) bool {
	return !h.ip.IsValid() && (h.name == domain || strings.HasSuffix(h.name, "."+domain))
}

// parseTarget parses an absolute URL to which tokens may travel: https, or http on a loopback address. The second
// result says what is wrong otherwise, without quoting the URL.
func parseTarget(raw string) (*url.URL, host, string) {
	if len(raw) > maxURLBytes {
		return nil, host{}, "is too long for a URL"
	}
	u, err := url.Parse(raw)
	if err != nil || u.Opaque != "" || u.Host == "" {
		return nil, host{}, "is not an absolute URL"
	}
	h, problem := checkTarget(u)
	return u, h, problem
}

func checkTarget(u *url.URL) (host, string) {
	if u.User != nil {
		return host{}, "must hold no user name or password"
	}
	h, ok := parseHost(u.Hostname())
	if !ok {
		return host{}, "must name its host in plain ASCII, or as a full IP address"
	}
	if port := u.Port(); port != "" || strings.HasSuffix(u.Host, ":") {
		if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
			return host{}, "must name a port from 1 to 65535, or none"
		}
	}
	if u.Scheme != "https" && (u.Scheme != "http" || !h.loopback()) {
		return host{}, "must be an https URL (http is for loopback addresses alone)"
	}
	return h, ""
}

// parseRoot parses an api root and returns the URL of the exchange below it.
func parseRoot(raw string) (*url.URL, host, string) {
	u, h, problem := parseTarget(raw)
	if problem != "" {
		return nil, host{}, problem + "; give one such as " + DefaultAPIRoot
	}
	if strings.ContainsAny(raw, "?#") {
		return nil, host{}, "must have no query and no fragment; give a URL such as " + DefaultAPIRoot
	}
	if u.Path == "" {
		u.Path = "/" // what JoinPath joins to nothing is relative
	}
	return u.JoinPath(callPath), h, ""
}

// parseDomain returns a redirect host in the form in which hosts are compared.
func parseDomain(raw string) (string, string) {
	const right = "must be domain names without scheme, port, path or *, such as kaiza.la; each stands for its subdomains too"
	h, ok := parseHost(raw)
	if !ok || h.ip.IsValid() {
		return "", right
	}
	return h.name, ""
}

// withCallPath completes a URL that names a base alone. Kaizala's documentation says that Location holds the new
// endpoint, and not whether it repeats the call's path (guess): a path is taken as the whole call's, no path as the
// base.
func withCallPath(u *url.URL) *url.URL {
	whole := *u
	whole.Fragment, whole.RawFragment = "", ""
	if whole.Path == "" || whole.Path == "/" {
		whole.Path, whole.RawPath = callPath, ""
	}
	return &whole
}

// permitted says why the secrets may not travel on from one URL to another, or "" where they may.
func (x *exchange) permitted(from, to *url.URL) string {
	h, problem := checkTarget(to)
	switch {
	case problem != "":
		return "Its address " + problem + "."
	case from.Scheme == "https" && to.Scheme != "https":
		return "It leads from https to http, which is never followed."
	case h == x.rootHost:
		return ""
	}
	for _, domain := range x.redirectHosts {
		if h.within(domain) {
			return ""
		}
	}
	return "If " + x.nameHost(h.name) + " is Kaizala's, the operator can add it to redirect_hosts."
}

// nameHost returns a host for an error's text, unless somebody has put what was sent into it.
func (x *exchange) nameHost(name string) string {
	for _, secret := range []string{x.connectorSecret, x.RefreshToken} {
		if strings.Contains(name, strings.ToLower(secret)) {
			return "that host"
		}
	}
	return name
}
