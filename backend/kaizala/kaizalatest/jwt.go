package kaizalatest

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"time"
)

// guid returns a random GUID, the form of the IDs of connectors and users (client).
func guid() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// secret returns 10 upper-case letters and digits (client).
func secret() string {
	const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
	var b [10]byte
	_, _ = rand.Read(b[:])
	for i := range b {
		b[i] = letters[int(b[i])%len(letters)]
	}
	return string(b[:])
}

// jwt signs a token for a holder with the claims that published clients show (client): HS256, with a key that only the
// service has. jti is ours (guess): without it, two tokens of the same second would be equal.
func (s *Service) jwt(h holder, issued, expires time.Time) string {
	data := map[string]any{"AppName": "Connector"}
	credentials := map[string]any{
		"phoneNumber":     h.user.phone,
		"applicationId":   h.connector,
		"permissions":     "8.4",
		"applicationType": -1,
	}
	if h.group != "" {
		data["GroupId"] = h.group
		credentials["tokenValidFrom"] = issued.UnixMilli()
	}
	credentials["data"] = text(data)
	payload := text(map[string]any{
		"iat":                       issued.Unix(),
		"nbf":                       issued.Unix(),
		"exp":                       expires.Unix(),
		"iss":                       "urn:microsoft:windows-azure:zumo",
		"aud":                       "urn:microsoft:windows-azure:zumo",
		"uid":                       "MobileAppsService:" + h.user.id,
		"ver":                       "2",
		"urn:microsoft:credentials": text(credentials),
		"jti":                       guid(),
	})
	signed := encode([]byte(`{"alg":"HS256","typ":"JWT"}`)) + "." + encode([]byte(payload))
	mac := hmac.New(sha256.New, s.key)
	mac.Write([]byte(signed))
	return signed + "." + encode(mac.Sum(nil))
}

func text(v any) string {
	raw, err := json.Marshal(v)
	if err != nil {
		panic(err) // maps of strings and numbers can be encoded
	}
	return string(raw)
}

func encode(raw []byte) string { return base64.RawURLEncoding.EncodeToString(raw) }
