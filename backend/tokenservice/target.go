package tokenservice

import (
	"net/netip"
	"net/url"
	"strconv"
	"strings"
)

// MaxURLBytes bounds a URL that is configured, remembered or handed to apps.
const MaxURLBytes = 2 << 10

// ShownURL returns a URL that a service has sent and that people and apps are shown; "" where it is too long, or holds what no URL has
// (RFC 3986, section 2), such as control characters, marks that turn the direction of the text, white space and quotes, or what a shell
// would read within quotes. It does not parse the URL.
func ShownURL(raw string) string {
	if strings.ContainsAny(raw, " \"<>\\^`{|}$'") {
		return ""
	}
	return ShownText(raw, MaxURLBytes)
}

// Host is a URL's host in the one form in which hosts are compared: lower case, no trailing dot, and the address where it
// is an IP literal. Two Hosts are the same host when they are equal.
type Host struct {
	name string
	ip   netip.Addr
}

// ParseHost reads the host of a URL, as [url.URL.Hostname] returns it. It refuses hosts that two parts of a system may read differently:
// non-ASCII names, IPv6 zones, and names that some resolvers take for an address, such as 127.1 or 0x7f000001.
func ParseHost(raw string) (Host, bool) {
	if ip, err := netip.ParseAddr(raw); err == nil {
		if ip.Zone() != "" {
			return Host{}, false
		}
		ip = ip.Unmap()
		return Host{name: ip.String(), ip: ip}, true
	}
	name := strings.ToLower(strings.TrimSuffix(raw, "."))
	if name == "" || len(name) > 253 {
		return Host{}, false
	}
	labels := strings.Split(name, ".")
	for _, label := range labels {
		if label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return Host{}, false
		}
	}
	last := labels[len(labels)-1]
	if strings.Trim(last, "0123456789") == "" || strings.HasPrefix(last, "0x") {
		return Host{}, false
	}
	return Host{name: name}, true
}

// String returns the host's name or address.
func (h Host) String() string { return h.name }

// IsAddress says whether the host is an IP address.
func (h Host) IsAddress() bool { return h.ip.IsValid() }

// Within says whether the host is the domain or lies below it. An address lies below nothing.
func (h Host) Within(domain string) bool {
	return !h.ip.IsValid() && (h.name == domain || strings.HasSuffix(h.name, "."+domain))
}

// ParseTarget parses an absolute URL to which tokens may travel: https, or http on a loopback address. The last result
// says what is wrong otherwise, without quoting the URL; it is the end of a sentence that begins with the field's name.
// The URL may have a query and a fragment; a caller who wants none looks for "?" and "#" in raw.
func ParseTarget(raw string) (*url.URL, Host, string) {
	if len(raw) > MaxURLBytes {
		return nil, Host{}, "is too long for a URL"
	}
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" {
		return nil, Host{}, "is not an absolute URL"
	}
	h, problem := CheckTarget(u)
	return u, h, problem
}

// CheckTarget does for a parsed URL what [ParseTarget] does for a text.
func CheckTarget(u *url.URL) (Host, string) {
	if u.User != nil {
		return Host{}, "must hold no user name or password"
	}
	h, ok := ParseHost(u.Hostname())
	if !ok {
		return Host{}, "must name its host in plain ASCII, or as a full IP address"
	}
	if port := u.Port(); port != "" || strings.HasSuffix(u.Host, ":") {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return Host{}, "must name a port from 1 to 65535, or none"
		}
	}
	thisMachine := h.ip.IsLoopback() || h.name == "localhost"
	if u.Scheme != "https" && (u.Scheme != "http" || !thisMachine) {
		return Host{}, "must be an https URL (http is for loopback addresses alone)"
	}
	return h, ""
}
