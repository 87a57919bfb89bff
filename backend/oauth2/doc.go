// Package oauth2 is a client of OAuth 2.0 authorization servers that issue refresh tokens: the refresh grant and the
// authorization code grant of RFC 6749 with PKCE (RFC 7636), revocation (RFC 7009), metadata (RFC 8414 and OpenID
// Connect Discovery), the device authorization grant (RFC 8628), and the issuer of an authorization response (RFC 9207).
// It knows HTTP and nothing of Vault.
//
// [New] makes a [Client] of a [Config]. The client is a [tokenservice.Service], [tokenservice.Revoker],
// [tokenservice.CodeFlow] and [tokenservice.DeviceFlow]. [Discover] reads a server's metadata.
//
// # Answers
//
// What an answer says decides, and then its status: some servers refuse with status 200. A body that begins with "{" is
// JSON whatever its Content-Type; another one is a form, if it holds access_token or error; anything else makes no sense.
// A new refresh token is the one thing that must never be lost, so it is read from a success even where the rest of
// the answer is cut off or odd. No error holds text of an answer, since that may quote what was sent: errors name the
// HTTP status, and an error code if it is one of those that the RFCs or the known servers define.
//
// # Requests
//
// A request is one POST of a form, made once for one permission. No redirect is followed. The client authenticates in
// the one way that is configured and never finds out by trying: a second try with the same refresh token counts as a reuse
// at many servers, and ends the grant.
package oauth2
