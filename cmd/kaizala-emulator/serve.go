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
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

func serve(ctx context.Context, p program, args []string) error {
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	flags.SetOutput(p.err)
	listen := flags.String("listen", "127.0.0.1:0", "the address to listen on, a loopback one; port 0 is any free one")
	accessLife := flags.Duration("access-token-life", 0, "how long access tokens live; 0 is 24h, for oauth2 1h")
	refreshLife := flags.Duration("refresh-token-life", 0, "how long refresh tokens live; 0 is 365 days, for oauth2 for ever")
	oldLives := flags.Bool("old-token-lives", false, "kaizala: let the old refresh token survive a rotation")
	name := flags.String("service", "kaizala", "what it emulates: kaizala, or oauth2, an authorization server")
	class := flags.String("class", "A", classHelp)
	rotation := flags.String("rotation", "each", "oauth2: what an exchange does to the refresh token: each, never, same or empty")
	grace := flags.Duration("grace", 0, "oauth2: how long a replaced refresh token goes on working")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("serve takes no argument %q", flags.Arg(0))
	}
	if *accessLife < 0 || *refreshLife < 0 || *grace < 0 {
		return errors.New("a duration is not negative")
	}
	var foreign error
	flags.Visit(func(f *flag.Flag) {
		kaizala, oauth2 := f.Name == "old-token-lives", f.Name == "class" || f.Name == "rotation" || f.Name == "grace"
		if (kaizala && *name != "kaizala") || (oauth2 && *name != "oauth2") {
			foreign = fmt.Errorf("-%s does not go with -service %s", f.Name, *name)
		}
	})
	if foreign != nil {
		return foreign
	}
	var handler http.Handler
	var setURL func(string)
	switch *name {
	case "kaizala":
		service := kaizalatest.New()
		service.SetAccessTokenLife(*accessLife)
		service.SetRefreshTokenLife(*refreshLife)
		service.SetOldTokenDies(!*oldLives)
		service.OnSMS(func(mobileNumber, text string) { fmt.Fprintf(p.out, "SMS to %s: %s\n", mobileNumber, text) })
		handler, setURL = newHandler(service), service.SetEndpointURL
	case "oauth2":
		service := oauth2test.New()
		if err := setOptions(service, *class, *rotation, func(o *oauth2test.Options) {
			o.AccessTokenLife, o.RefreshTokenLife, o.Grace = *accessLife, *refreshLife, *grace
		}); err != nil {
			return err
		}
		handler, setURL = newOAuth2Handler(service), service.SetURL
	default:
		return errors.New("-service must be kaizala or oauth2")
	}
	// Every request may change it, so it listens only on loopback.
	host, _, err := net.SplitHostPort(*listen)
	ip, ipErr := netip.ParseAddr(host)
	if err != nil || (host != "localhost" && (ipErr != nil || !ip.IsLoopback())) {
		return errors.New("-listen must be a loopback address with a port, such as 127.0.0.1:0")
	}
	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	at := "http://" + listener.Addr().String()
	setURL(at)

	logger := log.New(p.err, "", log.LstdFlags)
	server := &http.Server{
		Handler:           logged(logger, handler),
		ErrorLog:          logger,
		ReadHeaderTimeout: 10 * time.Second,
	}
	// Close and not Shutdown, because an exchange may hang by an injected fault.
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	fmt.Fprintln(p.out, "listening on "+at)
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// statusWriter records the status. Unwrap gives access to the connection, which a fault may break.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// logged logs method, path and status, but no header and no form, which have the tokens.
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

// newHandler serves the token service and its control API.
func newHandler(s *kaizalatest.Service) http.Handler {
	return withPortal(s, s, map[string]operation[*kaizalatest.Service]{
		"connector":        {"", portalConnector},
		"connector-secret": {"connector", portalConnectorSecret},
		"delete-connector": {"connector", portalDeleteConnector},
		"token":            {"connector user group", portalToken},
		"phone":            {"user", portalPhone},
		"exchanges":        {"user", portalExchanges},
		"settings":         {"access-token-life refresh-token-life old-token-lives limit-per-connector limit-per-tenant", portalSettings},
		"fault":            {"user times delay hang process reset truncate status body retry-after clear", portalFault},
	})
}

// operation is an operation of a control API, with the names of its fields.
type operation[S any] struct {
	fields string
	do     func(S, form) (string, error)
}

// withPortal serves a service and, below /portal/, its control API: a form in, plain text out, with the names of the
// subcommands.
func withPortal[S any](service http.Handler, s S, operations map[string]operation[S]) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", service)
	mux.HandleFunc("/portal/", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "the service that runs here has no such command", http.StatusNotFound)
	})
	for name, op := range operations {
		known := strings.Fields(op.fields)
		mux.HandleFunc("POST /portal/"+name, func(w http.ResponseWriter, r *http.Request) {
			if err := r.ParseForm(); err != nil {
				http.Error(w, "the form cannot be read", http.StatusBadRequest)
				return
			}
			for field := range r.PostForm {
				if !slices.Contains(known, field) {
					http.Error(w, "the service that runs here has no -"+field+" for this command", http.StatusBadRequest)
					return
				}
			}
			out, err := op.do(s, form{r})
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

// read calls set with the value of a field if the form has it. The error names a malformed field.
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

func portalPhone(s *kaizalatest.Service, f form) (string, error) {
	user := strings.TrimSpace(f.text("user"))
	if user == "" {
		return "", errors.New("user must not be empty")
	}
	return s.PhoneNumber(user) + "\n", nil
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
	fault, clearFirst, err := readFault(f)
	if err != nil {
		return "", err
	}
	if clearFirst {
		s.ClearFaults()
	}
	if fault != nil {
		s.Inject(*fault)
	}
	return "", nil
}

// readFault returns the fault in a form, nil if it has none, and whether all faults are to be cleared first.
func readFault(f form) (fault *kaizalatest.Fault, clearFirst bool, err error) {
	fault = &kaizalatest.Fault{User: f.text("user"), Body: f.text("body"), Header: http.Header{}}
	err = errors.Join(
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
	wrong := fault.Delay > 0 || fault.Hang || fault.Reset || fault.Truncate || fault.Status != 0
	switch {
	case err != nil:
		return nil, false, err
	case fault.Status != 0 && (fault.Status < 200 || fault.Status > 599):
		return nil, false, errors.New("status must be from 200 to 599")
	case !wrong && !clearFirst:
		return nil, false, errors.New("say what goes wrong: delay, hang, reset, truncate or status; or clear")
	case !wrong:
		fault = nil
	}
	return fault, clearFirst, nil
}
