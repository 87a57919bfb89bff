// Command kaizala-emulator is an emulator of Kaizala as a program: its token service and, for the people of the procedure, its
// portal, both in memory and on a loopback address. With "serve -service oauth2" it is an OAuth 2.0 authorization server
// instead. It is for demonstrations and acceptance tests: each program that can connect to it may do everything.
//
// "kaizala-emulator serve" is the service. The other subcommands call a running one, at -url or at $KAIZALA_EMULATOR_URL.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// command is a subcommand. run gets the arguments that follow its name.
type command struct {
	name, does string
	run        func(ctx context.Context, p program, args []string) error
}

// program is the environment of a subcommand.
type program struct {
	in       io.Reader
	out, err io.Writer
	getenv   func(string) string
}

func commands() []command {
	return []command{
		{"serve", "run the emulator until SIGINT or SIGTERM; -service oauth2: an authorization server", serve},
		{"connector", "register a connector (oauth2: a client); prints its ID and secret", connector},
		{"connector-secret", "give a connector a new secret; prints it", connectorSecret},
		{"delete-connector", "delete a connector, and with it its refresh tokens", deleteConnector},
		{"token", "generate a user's or a group's refresh token; prints it", token},
		{"phone", "print a user's mobile number, for a PIN; serve prints the SMS", portalCommand("phone", "user")},
		{"approve", "oauth2: consent to an authorization URL or a user code; prints where the browser goes", decide("approve")},
		{"deny", "oauth2: refuse to consent to one", decide("deny")},
		{"withdraw", "oauth2: withdraw a user's consent", portalCommand("withdraw", "user")},
		{"losses", "oauth2: print how often refresh tokens came twice, and the grants that were lost", portalCommand("losses")},
		{"me", "read an access token from stdin and call GET /v1/users/me with it", caller("me", "/v1/users/me", "accessToken", "")},
		{"userinfo", "oauth2: read an access token from stdin and call GET /userinfo with it", caller("userinfo", "/userinfo", "Authorization", "Bearer ")},
		{"exchanges", "print how many exchanges were granted", exchanges},
		{"settings", "change lives of tokens, the fate of old refresh tokens, and limits", settings},
		{"fault", "let exchanges go wrong", fault},
	}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, program{in: os.Stdin, out: os.Stdout, err: os.Stderr, getenv: os.Getenv}, os.Args[1:])
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "kaizala-emulator:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, p program, args []string) error {
	if len(args) > 0 {
		for _, c := range commands() {
			if c.name == args[0] {
				return c.run(ctx, p, args[1:])
			}
		}
	}
	fmt.Fprintln(p.err, "usage: kaizala-emulator COMMAND [-h] [flags]")
	for _, c := range commands() {
		fmt.Fprintf(p.err, "  %-18s%s\n", c.name, c.does)
	}
	if len(args) > 0 && slices.Contains([]string{"help", "-h", "-help", "--help"}, args[0]) {
		return nil
	}
	return errors.New("give one of these commands")
}

// client is a subcommand that calls a running emulator.
type client struct {
	program
	*flag.FlagSet
	url string
}

func newClient(p program, name string) *client {
	c := &client{program: p, FlagSet: flag.NewFlagSet(name, flag.ContinueOnError)}
	c.SetOutput(p.err)
	c.StringVar(&c.url, "url", p.getenv("KAIZALA_EMULATOR_URL"), "the emulator's URL; by default $KAIZALA_EMULATOR_URL")
	return c
}

func (c *client) parse(args []string, required ...string) error {
	if err := c.Parse(args); err != nil {
		return err
	}
	if c.NArg() > 0 {
		return fmt.Errorf("%s takes no argument %q", c.Name(), c.Arg(0))
	}
	if c.url == "" {
		return errors.New("give the emulator's URL as -url, or in $KAIZALA_EMULATOR_URL")
	}
	for _, name := range required {
		if c.Lookup(name).Value.String() == "" {
			return fmt.Errorf("%s needs -%s", c.Name(), name)
		}
	}
	return nil
}

// given returns the flags that the command line sets, without -url.
func (c *client) given() url.Values {
	values := url.Values{}
	c.Visit(func(f *flag.Flag) {
		if f.Name != "url" {
			values.Set(f.Name, f.Value.String())
		}
	})
	return values
}

// portal posts a form to the control API and prints the answer.
func (c *client) portal(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.at("/portal/"+c.Name()), strings.NewReader(c.given().Encode()))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	status, body, err := c.do(req)
	if err != nil {
		return err
	}
	if status != http.StatusOK {
		return errors.New(strings.TrimSpace(body))
	}
	_, err = io.WriteString(c.out, body)
	return err
}

func (c *client) at(path string) string { return strings.TrimSuffix(c.url, "/") + path }

func (c *client) do(req *http.Request) (int, string, error) {
	h := http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := h.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body), err
}

func connector(ctx context.Context, p program, args []string) error {
	c := newClient(p, "connector")
	c.String("method", "", "oauth2: how the client authenticates: client_secret_basic, client_secret_post or none")
	c.String("redirect-uri", "", "oauth2: where the browser may be sent back to")
	if err := c.parse(args); err != nil {
		return err
	}
	return c.portal(ctx)
}

func connectorSecret(ctx context.Context, p program, args []string) error {
	c := newClient(p, "connector-secret")
	c.String("connector", "", "the connector's ID")
	if err := c.parse(args, "connector"); err != nil {
		return err
	}
	return c.portal(ctx)
}

func deleteConnector(ctx context.Context, p program, args []string) error {
	c := newClient(p, "delete-connector")
	c.String("connector", "", "the connector's ID")
	if err := c.parse(args, "connector"); err != nil {
		return err
	}
	return c.portal(ctx)
}

func token(ctx context.Context, p program, args []string) error {
	c := newClient(p, "token")
	c.String("connector", "", "the connector's ID")
	c.String("user", "", "the user's name")
	c.String("group", "", "the group's ID, for a group token")
	c.String("scope", "", "oauth2: the scopes, with spaces between")
	if err := c.parse(args, "connector", "user"); err != nil {
		return err
	}
	return c.portal(ctx)
}

func exchanges(ctx context.Context, p program, args []string) error {
	c := newClient(p, "exchanges")
	c.String("user", "", "of this user alone")
	if err := c.parse(args); err != nil {
		return err
	}
	return c.portal(ctx)
}

func settings(ctx context.Context, p program, args []string) error {
	c := newClient(p, "settings")
	c.Duration("access-token-life", 0, "of access tokens issued from now on; 0 is 24h")
	c.Duration("refresh-token-life", 0, "of refresh tokens issued from now on; 0 is 365 days")
	c.Bool("old-token-lives", false, "whether the old refresh token survives a rotation")
	c.Int("limit-per-connector", 0, "calls in a minute; 0 is no limit")
	c.Int("limit-per-tenant", 0, "calls in a minute, over all connectors; 0 is no limit")
	c.String("class", "", "oauth2: A, B, C or D; resets the other settings")
	c.String("rotation", "", "oauth2: what an exchange does to the refresh token: each, never, same or empty")
	c.Duration("grace", 0, "oauth2: how long a replaced refresh token goes on working")
	if err := c.parse(args); err != nil {
		return err
	}
	return c.portal(ctx)
}

func fault(ctx context.Context, p program, args []string) error {
	c := newClient(p, "fault")
	c.String("user", "", "of this user's exchanges alone")
	c.String("endpoint", "", "oauth2: token (the default), revocation, device, metadata or userinfo")
	c.Int("times", 0, "how many exchanges; 0 is all until -clear")
	c.Duration("delay", 0, "wait this long first")
	c.Bool("hang", false, "never answer")
	c.Bool("process", false, "carry the exchange out before the fault")
	c.Bool("reset", false, "break the connection")
	c.Bool("truncate", false, "cut the right answer in the middle")
	c.Int("status", 0, "answer with this HTTP status")
	c.String("body", "", "and this body")
	c.Int("retry-after", 0, "and this Retry-After, in seconds")
	c.Bool("clear", false, "end all faults first")
	if err := c.parse(args); err != nil {
		return err
	}
	return c.portal(ctx)
}

// portalCommand is a subcommand with required flags, whose values are names.
func portalCommand(name string, flags ...string) func(context.Context, program, []string) error {
	return func(ctx context.Context, p program, args []string) error {
		c := newClient(p, name)
		for _, f := range flags {
			c.String(f, "", "the "+f+"'s name")
		}
		if err := c.parse(args, flags...); err != nil {
			return err
		}
		return c.portal(ctx)
	}
}

func decide(name string) func(context.Context, program, []string) error {
	return func(ctx context.Context, p program, args []string) error {
		c := newClient(p, name)
		c.String("authorization-url", "", "the authorization URL")
		c.String("user-code", "", "or the user code of a device")
		if name == "approve" {
			c.String("user", "", "who consents; by default the URL's login_hint")
		}
		if err := c.parse(args); err != nil {
			return err
		}
		return c.portal(ctx)
	}
}

// caller is a subcommand that makes a call with the access token in a header. Its exit status shows a script whether the token
// works.
func caller(name, path, header, scheme string) func(context.Context, program, []string) error {
	return func(ctx context.Context, p program, args []string) error {
		c := newClient(p, name)
		if err := c.parse(args); err != nil {
			return err
		}
		accessToken, err := io.ReadAll(io.LimitReader(p.in, 64<<10))
		if err != nil {
			return err
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.at(path), nil)
		if err != nil {
			return err
		}
		req.Header.Set(header, scheme+strings.TrimSpace(string(accessToken)))
		status, body, err := c.do(req)
		if err != nil {
			// net/http's error quotes a header that it cannot send.
			return errors.New("the call could not be made: no emulator at -url, or no access token on stdin")
		}
		fmt.Fprintf(p.out, "%d %s\n%s\n", status, http.StatusText(status), strings.TrimSpace(body))
		if status != http.StatusOK {
			return errors.New("the access token does not work")
		}
		return nil
	}
}
