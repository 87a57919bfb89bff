package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
)

func serve(ctx context.Context, p program, args []string) error {
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	flags.SetOutput(p.err)
	listen := flags.String("listen", "127.0.0.1:0", "the address to listen on, a loopback one; port 0 is any free one")
	accessLife := flags.Duration("access-token-life", 0, "how long access tokens live; 0 is 24h")
	refreshLife := flags.Duration("refresh-token-life", 0, "how long refresh tokens live; 0 is 365 days")
	oldLives := flags.Bool("old-token-lives", false, "let the old refresh token survive a rotation")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("serve takes no argument %q", flags.Arg(0))
	}
	if *accessLife < 0 || *refreshLife < 0 {
		return errors.New("a token's life is not negative")
	}
	// What it does for whoever asks is for this machine alone.
	host, _, err := net.SplitHostPort(*listen)
	ip, ipErr := netip.ParseAddr(host)
	if err != nil || (host != "localhost" && (ipErr != nil || !ip.IsLoopback())) {
		return errors.New("-listen must be a loopback address with a port, such as 127.0.0.1:0")
	}
	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	service := kaizalatest.New()
	service.SetAccessTokenLife(*accessLife)
	service.SetRefreshTokenLife(*refreshLife)
	service.SetOldTokenDies(!*oldLives)
	at := "http://" + listener.Addr().String()
	service.SetEndpointURL(at)

	logger := log.New(p.err, "", log.LstdFlags)
	server := &http.Server{
		Handler:           logged(logger, newHandler(service)),
		ErrorLog:          logger,
		ReadHeaderTimeout: 10 * time.Second,
	}
	// Close, and no Shutdown: an exchange may hang because somebody wished it to.
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	fmt.Fprintln(p.out, "listening on "+at)
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// statusWriter remembers the status. It unwraps, so that a connection can still be broken below it.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// logged logs method, path and status: no header and no form, which hold the tokens.
func logged(logger *log.Logger, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		sw := &statusWriter{ResponseWriter: w}
		defer func() {
			outcome := "no answer"
			if sw.status != 0 {
				outcome = strconv.Itoa(sw.status)
			}
			logger.Printf("%s %q %s", r.Method, r.URL.Path, outcome)
		}()
		next.ServeHTTP(sw, r)
	})
}

// newHandler serves the token service and, below /portal/, the control API: forms in, plain text out, by the names of the
// subcommands.
func newHandler(s *kaizalatest.Service) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", s)
	for name, do := range map[string]func(*kaizalatest.Service, form) (string, error){
		"connector":        portalConnector,
		"connector-secret": portalConnectorSecret,
		"delete-connector": portalDeleteConnector,
		"token":            portalToken,
		"exchanges":        portalExchanges,
		"settings":         portalSettings,
		"fault":            portalFault,
	} {
		mux.HandleFunc("POST /portal/"+name, func(w http.ResponseWriter, r *http.Request) {
			if err := r.ParseForm(); err != nil {
				http.Error(w, "the form cannot be read", http.StatusBadRequest)
				return
			}
			out, err := do(s, form{r})
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			w.WriteHeader(http.StatusOK)
			_, _ = w.Write([]byte(out))
		})
	}
	return mux
}

// form is a posted form, whose values are read by type.
type form struct{ r *http.Request }

func (f form) text(name string) string { return f.r.PostForm.Get(name) }
func (f form) has(name string) bool    { return f.r.PostForm.Has(name) }

// read calls set with a value that is there, and says which field is malformed.
func read[T any](f form, name string, parse func(string) (T, error), set func(T)) error {
	if !f.has(name) {
		return nil
	}
	v, err := parse(f.text(name))
	if err != nil {
		return fmt.Errorf("%s is malformed", name)
	}
	set(v)
	return nil
}

func into[T any](to *T) func(T) { return func(v T) { *to = v } }

func natural(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 31)
	return int(n), err
}

func life(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err == nil && d < 0 {
		err = errors.New("negative")
	}
	return d, err
}

func portalConnector(s *kaizalatest.Service, _ form) (string, error) {
	id, secret := s.RegisterConnector()
	return fmt.Sprintf("connector_id=%s\nconnector_secret=%s\n", id, secret), nil
}

func portalConnectorSecret(s *kaizalatest.Service, f form) (string, error) {
	secret := s.NewConnectorSecret(f.text("connector"))
	if secret == "" {
		return "", errors.New("there is no such connector")
	}
	return secret + "\n", nil
}

func portalDeleteConnector(s *kaizalatest.Service, f form) (string, error) {
	s.DeleteConnector(f.text("connector"))
	return "", nil
}

func portalToken(s *kaizalatest.Service, f form) (string, error) {
	id, user, group := f.text("connector"), strings.TrimSpace(f.text("user")), f.text("group")
	if user == "" {
		return "", errors.New("user must not be empty")
	}
	var token string
	if group == "" {
		token = s.GenerateUserToken(id, user)
	} else {
		token = s.GenerateGroupToken(id, user, group)
	}
	if token == "" {
		return "", errors.New("there is no such connector")
	}
	return token + "\n", nil
}

func portalExchanges(s *kaizalatest.Service, f form) (string, error) {
	n := s.TotalExchanges()
	if f.has("user") {
		n = s.Exchanges(f.text("user"))
	}
	return strconv.Itoa(n) + "\n", nil
}

func portalSettings(s *kaizalatest.Service, f form) (string, error) {
	perConnector, perTenant := s.Limits()
	return "", errors.Join(
		read(f, "access-token-life", life, s.SetAccessTokenLife),
		read(f, "refresh-token-life", life, s.SetRefreshTokenLife),
		read(f, "old-token-lives", strconv.ParseBool, func(lives bool) { s.SetOldTokenDies(!lives) }),
		read(f, "limit-per-connector", natural, func(n int) { perConnector = n; s.SetLimits(perConnector, perTenant) }),
		read(f, "limit-per-tenant", natural, func(n int) { s.SetLimits(perConnector, n) }),
	)
}

func portalFault(s *kaizalatest.Service, f form) (string, error) {
	fault := kaizalatest.Fault{User: f.text("user"), Body: f.text("body"), Header: http.Header{}}
	clearFirst := false
	err := errors.Join(
		read(f, "clear", strconv.ParseBool, into(&clearFirst)),
		read(f, "times", natural, into(&fault.Times)),
		read(f, "delay", life, into(&fault.Delay)),
		read(f, "hang", strconv.ParseBool, into(&fault.Hang)),
		read(f, "process", strconv.ParseBool, into(&fault.Process)),
		read(f, "reset", strconv.ParseBool, into(&fault.Reset)),
		read(f, "truncate", strconv.ParseBool, into(&fault.Truncate)),
		read(f, "status", natural, into(&fault.Status)),
		read(f, "retry-after", natural, func(n int) { fault.Header.Set("Retry-After", strconv.Itoa(n)) }),
	)
	switch {
	case err != nil:
		return "", err
	case fault.Status != 0 && (fault.Status < 200 || fault.Status > 599):
		return "", errors.New("status must be from 200 to 599")
	}
	if clearFirst {
		s.ClearFaults()
	}
	wrong := fault.Delay > 0 || fault.Hang || fault.Reset || fault.Truncate || fault.Status != 0
	switch {
	case wrong:
		s.Inject(fault)
	case !clearFirst:
		return "", errors.New("say what goes wrong: delay, hang, reset, truncate or status; or clear")
	}
	return "", nil
}
