package backend

import (
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/hashicorp/go-secure-stdlib/parseutil"
	"github.com/hashicorp/vault/sdk/framework"
)

// operationPrefix begins the operations' names in the OpenAPI document.
const operationPrefix = "kaizala"

// operation makes an operation of a path, with all that help and the OpenAPI
// document say of it.
func operation(verb, suffix, summary, description string, responses map[int][]framework.Response, f framework.OperationFunc) *framework.PathOperation {
	return &framework.PathOperation{
		Callback:     f,
		Summary:      summary,
		Description:  description,
		Responses:    responses,
		DisplayAttrs: &framework.DisplayAttributes{OperationVerb: verb, OperationSuffix: suffix},
	}
}

// responses documents what an operation answers.
func responses(status int, description string, fields ...map[string]*framework.FieldSchema) map[int][]framework.Response {
	return map[int][]framework.Response{status: {{Description: description, Fields: merged(fields...)}}}
}

func merged(fields ...map[string]*framework.FieldSchema) map[string]*framework.FieldSchema {
	all := map[string]*framework.FieldSchema{}
	for _, some := range fields {
		maps.Copy(all, some)
	}
	return all
}

// always marks fields of an answer that every answer has, and takes away the
// defaults, which belong to what is written.
func always(fields map[string]*framework.FieldSchema) map[string]*framework.FieldSchema {
	all := map[string]*framework.FieldSchema{}
	for name, field := range fields {
		required := *field
		required.Required, required.Default = true, nil
		all[name] = &required
	}
	return all
}

var (
	sensitive = &framework.DisplayAttributes{Sensitive: true}

	tenantField = &framework.FieldSchema{
		Type:        framework.TypeString,
		Description: "Name of the tenant: " + nameRule + ".",
	}
)

func str(description string) *framework.FieldSchema {
	return &framework.FieldSchema{Type: framework.TypeString, Description: description}
}

func oneOf(description string, values ...any) *framework.FieldSchema {
	return &framework.FieldSchema{Type: framework.TypeString, Description: description, AllowedValues: values}
}

func timeOf(description string) *framework.FieldSchema {
	return &framework.FieldSchema{Type: framework.TypeTime, Description: description + ", RFC 3339 in UTC."}
}

func timeIfKnown(description string) *framework.FieldSchema {
	field := timeOf(description)
	field.Description += " Absent when unknown."
	return field
}

func wholeNumber(description string) *framework.FieldSchema {
	return &framework.FieldSchema{Type: framework.TypeInt64, Description: description}
}

// connectorSettings are the fields of a connector that every kind of service has and that may be read.
var connectorSettings = map[string]*framework.FieldSchema{
	"service": {
		Type:        framework.TypeString,
		Default:     defaultService,
		Description: "Kind of the token service: kaizala, or oauth2 for any authorization server that issues refresh tokens. Cannot be changed while a tenant uses the connector.",
	},
	"connector_id": {
		Type:        framework.TypeString,
		Description: "ID of the connector: from Kaizala's portal, or the client ID at an authorization server. Cannot be changed while a tenant uses the connector.",
	},
	"ca_cert": {
		Type:         framework.TypeString,
		Description:  "CA certificates in PEM. The service's certificate is checked against these instead of the system's.",
		DisplayAttrs: &framework.DisplayAttributes{EditType: "file"},
	},
	"request_timeout": {
		Type:        framework.TypeDurationSecond,
		Description: "How long one attempt to reach the service may take, at least 1s. The default is 60s for Kaizala and 15s for oauth2.",
	},
	"exchanges_per_minute": {
		Type:        framework.TypeInt,
		Default:     defaultExchangesPerMinute,
		Description: "How many calls a minute the engine may make to the service with this connector, 1 or more. One tenant may begin a fifth of them as exchanges, and at least one. Kaizala allows a connector 100 calls, which includes the apps' own.",
	},
}

// connectorFields are what may be written to a connector.
func connectorFields() map[string]*framework.FieldSchema {
	return merged(connectorSettings, serviceFields(), map[string]*framework.FieldSchema{
		"connector_secret": {
			Type:         framework.TypeString,
			Description:  "Secret of the connector: from Kaizala's portal, or the client secret at an authorization server. Never returned.",
			DisplayAttrs: sensitive,
		},
	})
}

var namedConnectorField = map[string]*framework.FieldSchema{
	"connector": str("Name of the connector: " + nameRule + ". \"default\" is the one at config."),
}

// connectorReadFields are what a read of a connector answers: the fields of every kind, and those of its own.
func connectorReadFields() map[string]*framework.FieldSchema {
	all := always(merged(connectorSettings, map[string]*framework.FieldSchema{
		"request_timeout": wholeNumber("How long one attempt to reach the service may take, in seconds."),
	}))
	for name, field := range serviceFields() {
		shown := *field
		shown.Default = nil
		switch shown.Type {
		case framework.TypeDurationSecond:
			shown.Type = framework.TypeInt64
			shown.Description += " In seconds."
		case framework.TypeKVPairs:
			shown.Type = framework.TypeMap
		}
		all[name] = &shown
	}
	return merged(all, revocationFields)
}

var revocationFields = map[string]*framework.FieldSchema{
	"pending_revocations":   wholeNumber("Tokens that are still to be revoked at the service. Absent where there are none."),
	"last_revocation_error": str("Why the last revocation call failed. Absent when it succeeded."),
}

var connectorListFields = always(map[string]*framework.FieldSchema{
	"keys": {Type: framework.TypeStringSlice, Description: "The connectors' names. The one at config is \"default\"."},
})

// tenantFields are what may be written to a tenant.
var tenantFields = map[string]*framework.FieldSchema{
	"tenant": tenantField,
	"refresh_token": {
		Type:         framework.TypeString,
		Description:  "Refresh token that the service has issued. Required to create, and never returned. A second write of the same refresh token, after the service has replaced it, keeps the new one.",
		DisplayAttrs: sensitive,
	},
	"connector": {
		Type:        framework.TypeString,
		Default:     defaultConnector,
		Description: "Name of the connector that the refresh token was generated for.",
	},
	"ttl": {
		Type:        framework.TypeDurationSecond,
		Description: "Life of the leases; 0 is the mount's. A lease never lasts longer than its access token.",
	},
	"max_ttl": {
		Type:        framework.TypeDurationSecond,
		Description: "How long leases can be renewed; 0 is the mount's. A lease never lasts longer than its access token.",
	},
	"min_ttl": {
		Type:        framework.TypeDurationSecond,
		Default:     900,
		Description: "An access token with less life left is not handed out. At most half an access token's life counts.",
	},
	"retire_on_revoke": {
		Type:        framework.TypeBool,
		Default:     true,
		Description: "Whether revoking the last lease on an access token early retires that token. Always true where a revocation ends the token at the service.",
	},
	"token_per_lease": {
		Type:        framework.TypeBool,
		Default:     false,
		Description: "Whether each read of creds gets an access token of its own, which is revoked with its lease. Needs a connector with revocation=access_token and exchange_invalidates=false. Each read is an exchange, and the end of its lease one more call; a tenant may begin a fifth of exchanges_per_minute as exchanges.",
	},
	"verify": {
		Type:        framework.TypeBool,
		Default:     true,
		Description: "Whether refresh_token and connector are tried at the service before they are stored. This field itself is not stored.",
	},
}

// tenantStatusFields are what may be read of a tenant.
var tenantStatusFields = merged(always(map[string]*framework.FieldSchema{
	"connector": str("Name of the connector that exchanges the refresh token."),
	"ttl":       wholeNumber("Life of the leases in seconds; 0 is the mount's."),
	"max_ttl":   wholeNumber("How long leases can be renewed, in seconds; 0 is the mount's."),
	"min_ttl":   wholeNumber("Life in seconds that an access token must have left to be handed out."),
	"status": oneOf("ok; degraded: the last exchange failed and will be tried again; rejected: the service refuses the refresh token, a new one must be written; expired: a new one must be written; unverified: not tried yet.",
		statusOK, statusDegraded, statusRejected, statusExpired, statusUnverified),
	"retire_on_revoke":       {Type: framework.TypeBool, Description: "Whether revoking the last lease on an access token early retires that token."},
	"token_per_lease":        {Type: framework.TypeBool, Description: "Whether each read of creds gets an access token of its own."},
	"refresh_token_origin":   oneOf("How the refresh token came. operator: it was written, or a person granted access; service: the service has sent it in place of the one before.", originOperator, originService),
	"refresh_token_set_time": timeOf("When the refresh token came"),
}), revocationFields, map[string]*framework.FieldSchema{
	"kind":                      oneOf("What a Kaizala refresh token says it is.", "user", "group", "unknown"),
	"granted_time":              timeIfKnown("When a person granted access by authorize, device or pin"),
	"granted_by":                str("Who started the grant, by Vault's display name. Absent where the refresh token was written."),
	"subject":                   str("Who granted access, as the service says it. Absent when unknown."),
	"group_id":                  str("Group that a group token reaches. Absent for a user's token."),
	"scope":                     str("What the access token may do, as the service says it. Absent while there is none."),
	"endpoint_url":              str("Base URL for calls with the access token. Absent while there is none."),
	"refresh_token_expire_time": timeIfKnown("End of the refresh token"),
	"access_token_expire_time":  timeIfKnown("End of the current access token"),
	"last_exchange_time":        timeIfKnown("Last exchange of this refresh token that succeeded"),
	"next_exchange_time":        timeIfKnown("When the engine will exchange the refresh token without being asked"),
	"last_error":                str("Why the last exchange failed, and who has to do what. Absent when it succeeded."),
	"last_error_time":           timeIfKnown("When it failed"),
})

var tenantListFields = merged(always(map[string]*framework.FieldSchema{
	"keys": {Type: framework.TypeStringSlice, Description: "The tenants' names."},
}), map[string]*framework.FieldSchema{
	"key_info": {Type: framework.TypeMap, Description: "status, connector and refresh_token_expire_time of each tenant, by name. A tenant that could not be read, or has not been read yet, is absent."},
})

// credsFields are what a reader of an access token sees.
var credsFields = merged(always(map[string]*framework.FieldSchema{
	"access_token": {
		Type:         framework.TypeString,
		Description:  "The access token: to be sent as the header accessToken to Kaizala, or as the service says (Authorization: Bearer).",
		DisplayAttrs: sensitive,
	},
	"expire_time": timeOf("End of the access token"),
	"tenant":      str("Name of the tenant."),
}), map[string]*framework.FieldSchema{
	"endpoint_url": str("Base URL for calls with the access token; it may end in a slash. Absent where unknown."),
	"scope":        str("What the access token may do, as the service says it. Absent where unknown."),
	"token_type":   str("Type of the access token, as the service says it. Absent for Kaizala."),
})

var tokenFields = always(map[string]*framework.FieldSchema{
	"ttl":                 wholeNumber("Seconds until a read is sure to return a newer access token."),
	"rotation_period":     wholeNumber("Seconds from one access token to the next, 1 at the least."),
	"last_vault_rotation": timeOf("When this access token was obtained"),
})

// textOf reads a string; "" for null.
func textOf(d *framework.FieldData, name string) string {
	text, _ := d.Raw[name].(string)
	return strings.TrimSpace(text)
}

// scopesOf reads a list of scopes. They are separated by commas and white space, within an element of a JSON list too.
func scopesOf(d *framework.FieldData, name string) []string {
	return strings.FieldsFunc(strings.Join(d.Get(name).([]string), ","), func(r rune) bool { return r == ',' || unicode.IsSpace(r) })
}

// secondsOr reads a duration, which is the default where the field is null.
func secondsOr(d *framework.FieldData, name string, byDefault time.Duration) (time.Duration, error) {
	if d.Raw[name] == nil {
		return byDefault, nil
	}
	return seconds(d, name)
}

// seconds reads a duration. The framework would cut off fractions of seconds without an error, and make 0.5s the default.
func seconds(d *framework.FieldData, name string) (time.Duration, error) {
	v, err := parseutil.ParseDurationSecond(plain(d.Raw[name]))
	if err != nil || v%time.Second != 0 {
		return 0, badValue("%s has to be a duration of whole seconds, such as 90s, 15m or 24h", name)
	}
	return v, nil
}

// wholeNumberOf reads a number. The framework would take 1.9, true and 0x10 as well.
func wholeNumberOf(d *framework.FieldData, name string) (int, error) {
	n, err := strconv.Atoi(plain(d.Raw[name]))
	if err != nil {
		return 0, badValue("%s has to be a whole number, 1 or more", name)
	}
	return n, nil
}

// plain is a value as a person would have typed it. A number of JSON comes through Vault as a float64.
func plain(raw any) string {
	if n, ok := raw.(float64); ok {
		return strconv.FormatFloat(n, 'f', -1, 64)
	}
	return fmt.Sprint(raw)
}

// pairsOf reads a map of strings; nil for null. The framework would make strings of other values.
func pairsOf(d *framework.FieldData, name string) (map[string]string, error) {
	m, err := pairs(d.Raw[name])
	if err != nil {
		return nil, badValue("%s %s", name, err)
	}
	return m, nil
}

// pairs reads a map of strings as JSON gives it, or as the command line does: name=value. Its error does not quote a value.
func pairs(raw any) (map[string]string, error) {
	malformed := errors.New("has to be a map of names to strings, such as {\"audience\": \"https://api.example.com\"}, or one name=value")
	m := map[string]string{}
	switch raw := raw.(type) {
	case nil:
		return nil, nil
	case map[string]any:
		for name, value := range raw {
			text, ok := value.(string)
			if !ok {
				return nil, malformed
			}
			m[name] = text
		}
	case string:
		return pairs([]any{raw})
	case []any:
		for _, one := range raw {
			text, _ := one.(string)
			name, value, ok := strings.Cut(text, "=")
			if !ok || name == "" { // the framework's own message would quote the value
				return nil, malformed
			}
			m[name] = value
		}
	default:
		return nil, malformed
	}
	return m, nil
}

// plural names a number of things in English.
func plural(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}
