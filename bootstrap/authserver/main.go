// Command authserver is zitadel/oidc's example OpenID provider on a loopback address: an authorization server of another
// project, for tests and for trying the engine. It is its own Go module, so the plugin does not depend on it.
//
// Settings come from the environment:
//
//	PORT           the port to listen on; 0, the default, takes any free one
//	CLIENT_ID      the client that is registered; default engine
//	CLIENT_SECRET  its secret; the default has characters that Basic authentication has to encode (RFC 6749 §2.3.1)
//	REDIRECT_URIS  the client's redirect URIs, separated by spaces
//	ACCESS_TTL     an access token's life in seconds, 300 at most; the default is 300, as in the example
//
// When it is ready it prints one line of JSON: the endpoints, the client, a user who can log in, and two addresses that are
// not part of OAuth: a POST to mint answers with the refresh token of a new grant, and a GET of stats with [stats].
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/zitadel/oidc/v3/example/server/exampleop"
	"github.com/zitadel/oidc/v3/example/server/storage"
)

func main() {
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, "authserver:", err)
		os.Exit(1)
	}
}

func serve() error {
	clientID := cmp.Or(os.Getenv("CLIENT_ID"), "engine")
	clientSecret := cmp.Or(os.Getenv("CLIENT_SECRET"), "s3cr:t+/ %~&=")
	redirectURIs := strings.Fields(cmp.Or(os.Getenv("REDIRECT_URIS"), "http://127.0.0.1:8200/v1/kaizala/callback"))
	seconds, err := strconv.Atoi(cmp.Or(os.Getenv("ACCESS_TTL"), "300"))
	if err != nil || seconds < 1 || seconds > 300 {
		return errors.New("ACCESS_TTL is a number of seconds from 1 to 300")
	}

	listener, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", cmp.Or(os.Getenv("PORT"), "0")))
	if err != nil {
		return err
	}
	issuer := "http://" + listener.Addr().String()
	storage.RegisterClients(storage.WebClient(clientID, clientSecret, redirectURIs...))
	recorder := newRecorder(time.Duration(seconds) * time.Second)

	mux := http.NewServeMux()
	mux.HandleFunc("POST /control/mint", func(w http.ResponseWriter, r *http.Request) {
		token, err := recorder.mint(r.Context(), clientID)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		writeJSON(w, map[string]string{"refresh_token": token})
	})
	mux.HandleFunc("GET /control/stats", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, recorder.snapshot())
	})
	mux.Handle("/", exampleop.SetupServer(issuer, recorder, slog.New(slog.NewTextHandler(io.Discard, nil)), false))

	ready := map[string]string{
		"issuer":                        issuer,
		"authorization_endpoint":        issuer + "/auth",
		"token_endpoint":                issuer + "/oauth/token",
		"revocation_endpoint":           issuer + "/revoke",
		"introspection_endpoint":        issuer + "/oauth/introspect",
		"userinfo_endpoint":             issuer + "/userinfo",
		"device_authorization_endpoint": issuer + "/device_authorization",
		"verification_uri":              issuer + "/device",
		"client_id":                     clientID,
		"client_secret":                 clientSecret,
		"user":                          userID,
		"password":                      password,
		"mint":                          issuer + "/control/mint",
		"stats":                         issuer + "/control/stats",
	}
	if err := json.NewEncoder(os.Stdout).Encode(ready); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	defer context.AfterFunc(ctx, func() { _ = server.Close() })()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func writeJSON(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(value)
}
