// Package kaizala is a client of Kaizala's token service: it exchanges a refresh token for an access token, reads what a
// token says about itself, and gets a refresh token for a PIN. It implements [tokenservice.Service] and
// [tokenservice.PINFlow]; it knows HTTP and nothing of Vault.
//
// # The exchange
//
// One GET of {api root}/v1/accessToken with three request headers, applicationId, applicationSecret and refreshToken
// (doc). Credentials that travel in headers of their own are credentials that Go's http.Client forwards to whatever
// host a redirect names, so this client follows redirects itself: 308 and 307 only, five at most, and only to
// [Config.RedirectHosts], their subdomains and the api root's own host.
//
// The answer is JSON. Its refreshToken is empty or null until 90 % of the refresh token's life has passed; from then
// on every exchange returns a new one, which must be used from then on (doc). Whether the old one survives that is
// not documented, so a new refresh token is the one thing in an answer that must never be lost:
// [Client.Exchange] hands it out even when the rest of the answer is cut off or makes no sense.
//
// A body with an errorCode is an error whatever its HTTP status (client). Only such a body, whole and well-formed,
// is taken for a refusal; everything else that is no grant, a proxy's HTML for one, is [tokenservice.Unavailable], and
// worth another try.
//
// # What is sure
//
// (doc) marks what Microsoft documented, (client) what at least one published client did, and (guess) what is ours.
// The service was retired on 31 August 2023: nothing here has been tried on it.
package kaizala
