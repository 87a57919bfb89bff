package backend

import (
	"maps"

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
		Description: "Name of the tenant, 128 characters at most.",
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

// connectorSettings are the fields of a connector that may be read.
var connectorSettings = map[string]*framework.FieldSchema{
	"connector_id": {
		Type:        framework.TypeString,
		Description: "ID of the connector, from Kaizala's portal. Required to create; not changed while a tenant uses the connector.",
	},
	"api_root": {
		Type:        framework.TypeString,
		Default:     "https://api.kaiza.la",
		Description: "Where Kaizala is: an https URL, or plain http on a loopback address. Whoever writes it decides where refresh tokens are sent.",
	},
	"ca_cert": {
		Type:         framework.TypeString,
		Description:  "Certificates, in PEM, that api_root is checked against instead of the system's.",
		DisplayAttrs: &framework.DisplayAttributes{EditType: "file"},
	},
	"redirect_hosts": {
		Type:        framework.TypeCommaStringSlice,
		Default:     []string{"kaiza.la", "osi.office.net"},
		Description: "Domains that Kaizala may move a tenant's exchanges to, with their subdomains. api_root's own host is always among them.",
	},
	"request_timeout": {
		Type:        framework.TypeDurationSecond,
		Default:     60,
		Description: "How long one attempt to reach Kaizala may take, a second at least.",
	},
	"exchanges_per_minute": {
		Type:        framework.TypeInt,
		Default:     50,
		Description: "The engine's share of the 100 calls a minute that Kaizala allows a connector, 1 or more. No tenant takes more than a fifth of it, but at least one.",
	},
}

var connectorFields = merged(connectorSettings, map[string]*framework.FieldSchema{
	"connector_secret": {
		Type:         framework.TypeString,
		Description:  "Secret of the connector, from Kaizala's portal. Required to create, and never returned.",
		DisplayAttrs: sensitive,
	},
})

var namedConnectorFields = merged(connectorFields, map[string]*framework.FieldSchema{
	"connector": str("Name of the connector, 128 characters at most. \"default\" is the one at config."),
})

var connectorReadFields = always(merged(connectorSettings, map[string]*framework.FieldSchema{
	"request_timeout": wholeNumber("How long one attempt to reach Kaizala may take, in seconds."),
}))

var connectorListFields = always(map[string]*framework.FieldSchema{
	"keys": {Type: framework.TypeStringSlice, Description: "The connectors' names. The one at config is \"default\"."},
})

// tenantFields are what may be written to a tenant.
var tenantFields = map[string]*framework.FieldSchema{
	"tenant": tenantField,
	"refresh_token": {
		Type:         framework.TypeString,
		Description:  "Refresh token that Kaizala's portal shows once. Required to create, and never returned.",
		DisplayAttrs: sensitive,
	},
	"connector": {
		Type:        framework.TypeString,
		Default:     defaultConnector,
		Description: "Name of the connector that the refresh token was generated for.",
	},
	"ttl": {
		Type:        framework.TypeDurationSecond,
		Description: "Life of the leases, the mount's where it is 0. Never beyond the access token's.",
	},
	"max_ttl": {
		Type:        framework.TypeDurationSecond,
		Description: "How long leases can be renewed, the mount's where it is 0. Never beyond the access token's life.",
	},
	"min_ttl": {
		Type:        framework.TypeDurationSecond,
		Default:     900,
		Description: "An access token with less life left is not handed out. Counts as half an access token's life where it is longer.",
	},
	"verify": {
		Type:        framework.TypeBool,
		Default:     true,
		Description: "Try refresh_token and connector against Kaizala before they are stored. Not stored itself.",
	},
}

// tenantStatusFields are what may be read of a tenant.
var tenantStatusFields = merged(always(map[string]*framework.FieldSchema{
	"connector": str("Name of the connector that exchanges the refresh token."),
	"ttl":       wholeNumber("Life of the leases in seconds; 0 is the mount's."),
	"max_ttl":   wholeNumber("How long leases can be renewed, in seconds; 0 is the mount's."),
	"min_ttl":   wholeNumber("Life in seconds that an access token must have left to be handed out."),
	"status": oneOf("ok; degraded: the last exchange failed and will be tried again; rejected: Kaizala refuses the refresh token, a new one must be written; expired: a new one must be written; unverified: not tried yet.",
		statusOK, statusDegraded, statusRejected, statusExpired, statusUnverified),
	"kind":                   oneOf("What the refresh token says it is.", "user", "group", "unknown"),
	"refresh_token_origin":   oneOf("Who the refresh token came from: an operator who wrote it, or the service, which replaced the one before.", originOperator, originService),
	"refresh_token_set_time": timeOf("When the refresh token came"),
}), map[string]*framework.FieldSchema{
	"group_id":                  str("Group that a group token reaches. Absent for a user's token."),
	"scope":                     str("What the access token may do, as Kaizala says it. Absent while there is none."),
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
	"key_info": {Type: framework.TypeMap, Description: "status, connector and refresh_token_expire_time of each tenant, by name. A tenant that could not be read, or was not yet, is absent."},
})

// credsFields are what a reader of an access token sees.
var credsFields = always(map[string]*framework.FieldSchema{
	"access_token": {
		Type:         framework.TypeString,
		Description:  "The access token, to be sent as the header accessToken.",
		DisplayAttrs: sensitive,
	},
	"endpoint_url": str("Base URL for calls with the access token; it may end in a slash."),
	"scope":        str("What the access token may do, as Kaizala says it."),
	"expire_time":  timeOf("End of the access token"),
	"tenant":       str("Name of the tenant."),
})

var tokenFields = always(map[string]*framework.FieldSchema{
	"ttl":                 wholeNumber("Seconds until a read is sure to return a newer access token."),
	"rotation_period":     wholeNumber("Seconds from one access token to the next, 1 at the least."),
	"last_vault_rotation": timeOf("When this access token was obtained"),
})

const (
	backendHelp = `
The Kaizala secrets engine keeps the refresh tokens of Kaizala's tenant users
and hands out access tokens. The connector's owner writes config, a tenant user
writes tenants/<tenant>, and apps read creds/<tenant>; each sees nothing of the
others' secrets.
`
	configHelp = `
A connector acts for tenant users. Its ID and secret come from Kaizala's portal.
The path config is the connector named default; config/<connector> is a further
one. api_root, redirect_hosts and ca_cert decide where refresh tokens are sent:
they are the Vault operator's to write, and the policy of the connector's owner
withholds them with allowed_parameters.
`
	tenantListHelp = `
Names every tenant. In key_info each has its status, its connector and, where it
is known, the end of its refresh token: what a monitor needs, in one read, with
no secret in it.
`
	tenantHelp = `
The tenant user generates a refresh token on Kaizala's portal, where it is shown
once, and writes it here. Nobody can read it back. The engine replaces it with
the new one that Kaizala sends near the end of its year. A read shows the
settings, the status, and who has to do what where something is wrong.
`
	refreshHelp = `
Exchanges the refresh token now, whatever the tenant's backoff or a rejection
say, but within Kaizala's limits. From then on the new access token is handed
out: this is the sure way to retire an access token. Kaizala itself cannot
revoke one, which works until it expires.
`
	credsHelp = `
Every reader gets the same access token while it is usable, each with a lease of
his own that ends before the token does. When the last live lease is revoked
before its end, the token is never handed out again. Kaizala itself cannot
revoke it: until it expires it works.
`
	tokenHelp = `
The access token that creds/<tenant> hands out, without a lease, for readers that
come with each of their own requests. ttl says when a read is sure to return a
newer one; Vault Agent and the Vault Secrets Operator schedule by it.
`
)
