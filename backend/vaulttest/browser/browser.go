// Package browser goes through the pages of an authorization server, and then those of the engine, like a person with a
// browser: it logs in, allows or refuses, and submits one form after another.
package browser

import (
	"errors"
	"fmt"
	"html"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"regexp"
	"strings"
	"time"

	"github.com/hashicorp/go-cleanhttp"
)

// Person is the user of the browser, and what he does.
type Person struct {
	User, Password string
	Refuses        bool   // presses Cancel, Abort or Deny if there is such a button
	StopAt         string // a URL without its query: a redirect to it is not followed, but reported
}

// Visit is the pages that a person saw.
type Visit struct {
	Pages     []Page
	StoppedAt string // the redirect to Person's StopAt, with its query; "" if there was none
}

// Page is one page.
type Page struct {
	URL    *url.URL
	Status int
	HTML   string
}

// Last is the page that the visit ended with.
func (v Visit) Last() Page { return v.Pages[len(v.Pages)-1] }

// maxForms is more than the forms of a login, a consent and a confirmation.
const maxForms = 6

// Open opens an address in a new browser, without cookies, and goes on until a page has no form, or until the redirect to
// StopAt. It returns an error of the network, or an error if a page asks for the same again and again.
func (p Person) Open(address string) (Visit, error) {
	jar, err := cookiejar.New(nil)
	if err != nil {
		return Visit{}, err
	}
	// No connection is kept after the visit: a test would find its goroutine.
	transport := cleanhttp.DefaultTransport()
	transport.Proxy = nil
	b := &browser{person: p}
	b.http = &http.Client{Transport: transport, Timeout: 30 * time.Second, Jar: jar, CheckRedirect: b.redirected}
	if err := b.get(address); err != nil {
		return b.visit, err
	}
	for range maxForms {
		if b.visit.StoppedAt != "" {
			return b.visit, nil
		}
		done, err := b.goOn()
		if err != nil || done {
			return b.visit, err
		}
	}
	return b.visit, fmt.Errorf("%s asks again and again: %s", b.visit.Last().URL.Path, b.visit.Last().Text())
}

type browser struct {
	http   *http.Client
	person Person
	visit  Visit
}

func (b *browser) redirected(r *http.Request, via []*http.Request) error {
	to := *r.URL
	to.RawQuery = ""
	if b.person.StopAt != "" && to.String() == b.person.StopAt {
		b.visit.StoppedAt = r.URL.String()
		return http.ErrUseLastResponse
	}
	if len(via) >= 10 {
		return errors.New("redirected ten times in a row")
	}
	return nil
}

func (b *browser) get(address string) error {
	req, err := http.NewRequest(http.MethodGet, address, nil)
	if err != nil {
		return err
	}
	return b.send(req)
}

func (b *browser) send(req *http.Request) error {
	req.Header.Set("Accept", "text/html")
	resp, err := b.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return err
	}
	b.visit.Pages = append(b.visit.Pages, Page{URL: resp.Request.URL, Status: resp.StatusCode, HTML: string(body)})
	return nil
}

var (
	formPattern    = regexp.MustCompile(`(?is)<form\b([^>]*)>(.*?)</form>`)
	inputPattern   = regexp.MustCompile(`(?i)<(?:input|button)\b([^>]*)>`)
	attrPattern    = regexp.MustCompile(`(?i)\b(action|name|value|type)=(?:"([^"]*)"|'([^']*)'|([^\s>]+))`)
	cancelPattern  = regexp.MustCompile(`href="([^"]*/abort)"`)                          // oidc-provider's login and consent
	allowPattern   = regexp.MustCompile(`location\.href='(\./confirm\?action=)allowed'`) // zitadel's buttons for a device
	unseenPattern  = regexp.MustCompile(`(?is)<(head|style|script)\b.*?</(head|style|script)>`)
	elementPattern = regexp.MustCompile(`<[^>]*>`)
)

// goOn fills in and submits the form of the present page, and returns whether the page has none.
func (b *browser) goOn() (done bool, err error) {
	page := b.visit.Last()
	if link := allowPattern.FindStringSubmatch(page.HTML); link != nil {
		action := "allowed"
		if b.person.Refuses {
			action = "denied"
		}
		return true, b.follow(link[1] + action)
	}
	if link := cancelPattern.FindStringSubmatch(page.HTML); link != nil && b.person.Refuses {
		return false, b.follow(html.UnescapeString(link[1]))
	}
	form := formPattern.FindStringSubmatch(page.HTML)
	if form == nil {
		return true, nil
	}
	fields := url.Values{}
	for _, input := range inputPattern.FindAllStringSubmatch(form[2], -1) {
		if a := attributes(input[1]); a["name"] != "" {
			fields.Set(a["name"], a["value"])
		}
	}
	for _, name := range []string{"username", "login"} {
		if fields.Has(name) {
			fields.Set(name, b.person.User)
		}
	}
	if fields.Has("password") {
		fields.Set("password", b.person.Password)
	}
	// oidc-provider's page for a device has a second button, which aborts.
	aborts := b.person.Refuses && fields.Has("confirm")
	if aborts {
		fields.Set("abort", "yes")
	}
	to, err := page.URL.Parse(attributes(form[1])["action"])
	if err != nil {
		return false, err
	}
	req, err := http.NewRequest(http.MethodPost, to.String(), strings.NewReader(fields.Encode()))
	if err != nil {
		return false, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	return aborts, b.send(req) // after an abort the page asks for a user code again
}

func (b *browser) follow(reference string) error {
	to, err := b.visit.Last().URL.Parse(reference)
	if err != nil {
		return err
	}
	return b.get(to.String())
}

func attributes(tag string) map[string]string {
	found := map[string]string{}
	for _, a := range attrPattern.FindAllStringSubmatch(tag, -1) {
		found[strings.ToLower(a[1])] = html.UnescapeString(a[2] + a[3] + a[4])
	}
	return found
}

// Text is the text of the page without its markup, in one line.
func (p Page) Text() string {
	text := elementPattern.ReplaceAllString(unseenPattern.ReplaceAllString(p.HTML, ""), " ")
	return strings.Join(strings.Fields(html.UnescapeString(text)), " ")
}
