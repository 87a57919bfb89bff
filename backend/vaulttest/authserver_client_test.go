package vaulttest

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"net/url"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// clientOf is the engine's client, configured from the server's metadata.
func clientOf(t *testing.T, s *AuthServer, edit func(*oauth2.Config)) *oauth2.Client {
	t.Helper()
	m, err := oauth2.Discover(t.Context(), s.Issuer, oauth2.DiscoverOptions{RequestTimeout: 10 * time.Second})
	require.NoError(t, err)
	require.Equal(t, oauth2.Metadata{
		TokenURL: s.TokenURL, RevocationURL: s.RevocationURL, AuthorizationURL: s.AuthorizationURL,
		DeviceAuthorizationURL: s.DeviceAuthorizationURL,
		AuthMethod:             oauth2.ClientSecretBasic,
		IssuerPromised:         s.Name == "oidc-provider",
	}, *m)
	c := oauth2.Config{
		ClientID: s.ClientID, ClientSecret: s.ClientSecret, AuthMethod: m.AuthMethod,
		Issuer: s.Issuer, IssuerPromised: m.IssuerPromised,
		TokenURL: m.TokenURL, RevocationURL: m.RevocationURL, AuthorizationURL: m.AuthorizationURL, DeviceAuthorizationURL: m.DeviceAuthorizationURL,
		AccessTokenLife: time.Hour, KeepAlive: 72 * time.Hour, RequestTimeout: 10 * time.Second,
		ExchangeInvalidates: s.Name == "zitadel",
		Revocation:          oauth2.RevokeAccessToken,
	}
	if edit != nil {
		edit(&c)
	}
	client, err := oauth2.New(c)
	require.NoError(t, err)
	t.Cleanup(client.Close)
	return client
}

func requireFailure(t *testing.T, kind tokenservice.Kind, err error) {
	t.Helper()
	f, ok := errors.AsType[*tokenservice.Failure](err)
	require.True(t, ok, "%v", err)
	require.Equal(t, kind, f.Kind, "%v", err)
}

// The engine's client works with servers of other projects as with the emulator.
func TestClientOnAuthServers(t *testing.T) {
	const redirect = "http://127.0.0.1:1/v1/oauth/callback"
	for _, c := range []struct {
		name     string
		start    func(testing.TB, ...string) *AuthServer
		settings []string
	}{
		{"zitadel", StartZitadel, nil},
		{"oidc-provider", StartOIDCProvider, []string{"REVOKE_CASCADE=access-only"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := c.start(t, append(c.settings, "REDIRECT_URIS="+redirect)...)
			client := clientOf(t, s, nil)
			exchange := func(refreshToken string) tokenservice.Result {
				t.Helper()
				return client.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: refreshToken})
			}

			t.Run("exchange", func(t *testing.T) {
				first := s.Mint(t)
				before := time.Now()
				r := exchange(first)
				require.NoError(t, r.Err)
				require.Equal(t, "Bearer", r.AccessToken.Type)
				require.NotEmpty(t, r.RefreshToken)
				require.Empty(t, r.Subject)
				life := 300 * time.Second
				if s.Name == "oidc-provider" {
					life = time.Hour
				}
				require.WithinDuration(t, before.Add(life), r.AccessToken.Expires, 5*time.Second)
				status, subject := s.Userinfo(t, r.AccessToken.Token)
				require.Equal(t, 200, status)
				require.Equal(t, s.User, subject)
				// The client counts the token's life from when it sent the request, so its end is not later than the server's.
				require.False(t, r.AccessToken.Expires.After(r.Sent.Add(life)))

				require.NoError(t, client.Revoke(t.Context(), r.AccessToken.Token, tokenservice.TypeAccessToken, nil))
				require.False(t, s.Alive(t, r.AccessToken.Token))
				require.NoError(t, client.Revoke(t.Context(), r.AccessToken.Token, tokenservice.TypeAccessToken, nil), "again")
				require.NoError(t, client.Revoke(t.Context(), "unknown", tokenservice.TypeRefreshToken, nil))
				requireFailure(t, tokenservice.RefusedRefreshToken, exchange(first).Err)

				r = exchange(s.Mint(t))
				require.NoError(t, r.Err)
				require.NoError(t, client.Revoke(t.Context(), r.RefreshToken, tokenservice.TypeRefreshToken, nil))
				requireFailure(t, tokenservice.RefusedRefreshToken, exchange(r.RefreshToken).Err)
				require.False(t, s.Alive(t, r.AccessToken.Token))
			})

			t.Run("authentication", func(t *testing.T) {
				refreshToken := s.Mint(t)
				for _, edit := range []func(*oauth2.Config){
					func(c *oauth2.Config) { c.ClientSecret = "wrong" },
					func(c *oauth2.Config) { c.ClientSecret = "wrong"; c.AuthMethod = oauth2.ClientSecretPost },
				} {
					wrong := clientOf(t, s, edit)
					requireFailure(t, tokenservice.RefusedConnector, wrong.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: refreshToken}).Err)
					requireFailure(t, tokenservice.RefusedConnector, wrong.Revoke(t.Context(), refreshToken, tokenservice.TypeRefreshToken, nil))
				}
				nobody := clientOf(t, s, func(c *oauth2.Config) { c.ClientID = "nobody" })
				err := nobody.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: refreshToken}).Err
				if s.Name == "zitadel" {
					requireFailure(t, tokenservice.Unavailable, err) // it says 500 server_error
				} else {
					requireFailure(t, tokenservice.RefusedConnector, err)
				}
				scope := clientOf(t, s, func(c *oauth2.Config) { c.TokenParams = map[string]string{"scope": "openid everything"} })
				requireFailure(t, tokenservice.Refused, scope.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: refreshToken}).Err)

				post := clientOf(t, s, func(c *oauth2.Config) { c.AuthMethod = oauth2.ClientSecretPost })
				r := post.Exchange(t.Context(), tokenservice.Exchange{RefreshToken: refreshToken})
				require.NoError(t, r.Err, "the refused requests have not used up the refresh token")
			})

			t.Run("code", func(t *testing.T) {
				params := map[string]string{"prompt": "consent"}
				client := clientOf(t, s, func(c *oauth2.Config) { c.AuthorizationParams = params })
				verifier := rand.Text() + rand.Text()
				challenge := sha256.Sum256([]byte(verifier))
				request := tokenservice.AuthorizationRequest{
					RedirectURI: redirect, State: "a state", Challenge: base64.RawURLEncoding.EncodeToString(challenge[:]),
					Scopes: []string{"openid", "offline_access"}, LoginHint: s.User,
				}
				code := func() string {
					t.Helper()
					to, err := client.AuthorizationURL(request)
					require.NoError(t, err)
					back, err := url.Parse(s.Consent(t, to))
					require.NoError(t, err)
					require.Equal(t, "a state", back.Query().Get("state"))
					issuer, promised := client.Issuer()
					require.Equal(t, s.Issuer, issuer)
					require.Equal(t, promised, back.Query().Has("iss"))
					if promised {
						require.Equal(t, issuer, back.Query().Get("iss"))
					}
					return back.Query().Get("code")
				}
				redeem := func(code, verifier string) tokenservice.Result {
					t.Helper()
					return client.RedeemCode(t.Context(), tokenservice.CodeRedemption{Code: code, RedirectURI: redirect, Verifier: verifier})
				}

				once := code()
				r := redeem(once, verifier)
				require.NoError(t, r.Err)
				require.Equal(t, s.User, r.Subject)
				require.NotEmpty(t, r.RefreshToken)
				require.True(t, s.Alive(t, r.AccessToken.Token))
				require.NoError(t, exchange(r.RefreshToken).Err)

				other := code()
				requireFailure(t, tokenservice.RefusedRefreshToken, redeem(other, rand.Text()+rand.Text()).Err)
				requireFailure(t, tokenservice.RefusedRefreshToken, redeem("no code at all", verifier).Err)

				request.Scopes = []string{"openid"}
				r = redeem(code(), verifier)
				requireFailure(t, tokenservice.Refused, r.Err)
				require.NotNil(t, r.AccessToken, "the engine needs it to give it up")
				require.Empty(t, r.RefreshToken)
				require.NoError(t, client.Revoke(t.Context(), r.AccessToken.Token, tokenservice.TypeAccessToken, nil))
				require.False(t, s.Alive(t, r.AccessToken.Token))
			})

			t.Run("device", func(t *testing.T) {
				start := func() *tokenservice.DeviceStart {
					t.Helper()
					d, err := client.StartDevice(t.Context(), tokenservice.DeviceRequest{Scopes: []string{"openid", "offline_access"}})
					require.NoError(t, err)
					require.Equal(t, 5*time.Second, d.Interval)
					require.Equal(t, s.VerificationURL, d.VerificationURI)
					require.Contains(t, d.VerificationURIComplete, d.UserCode)
					return d
				}
				d := start()
				requireFailure(t, tokenservice.Pending, client.PollDevice(t.Context(), d.DeviceCode, nil).Err)
				s.DeviceApprove(t, d.UserCode)
				r := client.PollDevice(t.Context(), d.DeviceCode, nil)
				require.NoError(t, r.Err)
				require.Equal(t, s.User, r.Subject)
				require.NoError(t, exchange(r.RefreshToken).Err)

				d = start()
				s.DeviceDeny(t, d.UserCode)
				requireFailure(t, tokenservice.Denied, client.PollDevice(t.Context(), d.DeviceCode, nil).Err)
			})
		})
	}
}

// An access token that is a JWT cannot be revoked, and the failure's kind tells the engine not to try again.
func TestClientOnJWTs(t *testing.T) {
	s := StartOIDCProvider(t, "ACCESS_FORMAT=jwt")
	client := clientOf(t, s, nil)
	r := client.Exchange(context.Background(), tokenservice.Exchange{RefreshToken: s.Mint(t)})
	require.NoError(t, r.Err)
	requireFailure(t, tokenservice.Unsupported, client.Revoke(t.Context(), r.AccessToken.Token, tokenservice.TypeAccessToken, nil))
	require.True(t, s.Alive(t, r.AccessToken.Token))
}
