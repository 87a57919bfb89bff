package backend

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/share"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// badValue is the answer to a request that must be changed before it can succeed.
func badValue(format string, args ...any) error {
	return logical.CodedError(http.StatusBadRequest, fmt.Sprintf(format, args...))
}

func isBadValue(err error) bool {
	var coded logical.HTTPCodedError
	return errors.As(err, &coded) && coded.Code() == http.StatusBadRequest
}

func notFound(format string, args ...any) error {
	return logical.CodedError(http.StatusNotFound, fmt.Sprintf(format, args...))
}

// tryAgain is the answer where nothing is wrong with the request.
func tryAgain(format string, args ...any) error {
	return logical.CodedError(http.StatusServiceUnavailable, fmt.Sprintf(format, args...))
}

func unknownTenant(name string) error {
	return badValue("there is no tenant %q: its tenant user has to connect it, or write tenants/%s, first", name, name)
}

func unknownConnector(name string) error {
	return badValue("connector %q is not configured: its owner (for Kaizala) or the Vault operator (for an OAuth 2.0 service) has to write %s first", name, configPath(name))
}

// configPath is where a connector is written.
func configPath(connector string) string {
	if connector == defaultConnector {
		return "config"
	}
	return "config/" + connector
}

// badStored is the error of a stored connector that no client can be made of. It wraps errUnreadable, because another try fails in the same
// way.
func badStored(name string, err error) error {
	return fmt.Errorf("the stored configuration of connector %q %w by this version of the plugin: %w; write %s again", name, errUnreadable, err, configPath(name))
}

// errStopping is the answer of an engine that Vault is shutting down. It does not say that nothing was lost, because the stop may have given up
// an exchange whose answer had a new refresh token in it.
var errStopping = tryAgain("the engine is stopping: try again in a moment")

// errStorage says that storage has failed, where its own error is not passed on.
var errStorage = errors.New("storage failed")

// answer turns an error into what a handler returns, so that Vault answers with the right status. Vault finds the status of coded and
// read-only errors only if nothing wraps them. A 400 becomes an error response, because its text reads best that way.
func answer(err error) (*logical.Response, error) {
	var coded logical.HTTPCodedError
	switch {
	case errors.As(err, &coded) && coded.Code() == http.StatusBadRequest:
		return logical.ErrorResponse(coded.Error()), nil
	case errors.As(err, &coded):
		return nil, coded
	case errors.Is(err, context.DeadlineExceeded):
		return nil, tryAgain("Vault's storage, or an earlier write, has not finished in time: try again")
	}
	return nil, storageError(err)
}

// readerError says what the failure of a tenant's exchange means to the reader, and who has to do what.
func readerError(about tokenservice.About, tenant, connector string, err error) error {
	var (
		failure *tokenservice.Failure
		limit   *share.LimitError
	)
	switch {
	case errors.As(err, &limit):
		return limitReached(about, connector, limit, fmt.Sprintf("the share of calls of connector %q, or tenant %q's fifth of it, is used up", connector, tenant))
	case !errors.As(err, &failure):
		return err
	}
	switch failure.Kind {
	case tokenservice.RefusedRefreshToken:
		return badValue("%s", rejectedText(about, tenant))
	case tokenservice.RefusedConnector:
		return badValue("%s refuses connector %q: its owner has to write the right connector_id and connector_secret to %s; no refresh token was lost", upperFirst(about.Name), connector, configPath(connector))
	case tokenservice.Refused:
		return badValue("%s refused the exchange for tenant %q: %s", upperFirst(about.Name), tenant, failure.Text)
	case tokenservice.Limited:
		return tooMany(time.Now().Add(restOf(failure)), "%s has refused further calls of connector %q", upperFirst(about.Name), connector)
	default:
		return tryAgain("no access token for tenant %q, but nothing was lost: %s", tenant, failure.Text)
	}
}

// limitReached says that no call is permitted for now: by the service, or, as own says, by the engine's own limits.
func limitReached(about tokenservice.About, connector string, limit *share.LimitError, own string) error {
	if limit.ByService {
		return tooMany(limit.Until, "%s has refused further calls of connector %q", upperFirst(about.Name), connector)
	}
	return tooMany(limit.Until, "%s", own)
}

func tooMany(until time.Time, format string, args ...any) error {
	wait := time.Until(until).Round(time.Second)
	return logical.CodedError(http.StatusTooManyRequests,
		fmt.Sprintf("%s: try again in %s, at %s", fmt.Sprintf(format, args...), max(wait, time.Second), until.UTC().Format(time.RFC3339)))
}

// storageTrouble says that Vault's storage has not taken what a tenant needs stored. logical.ErrReadOnly stays as it is, so that Vault asks
// the node that may write.
func storageTrouble(tenant string, err error) error {
	if errors.Is(err, logical.ErrReadOnly) {
		return err
	}
	return tryAgain("Vault's storage did not take what tenant %q needs stored: nothing was lost; try again later", tenant)
}

// keptTrouble says that only memory has what the service has sent. It is never logical.ErrReadOnly: the node that Vault would ask then
// would exchange the refresh token that the service has replaced.
func keptTrouble(tenant string) error {
	return tryAgain("Vault's storage has not taken the new tokens of tenant %q yet: they are kept in memory, and storing them is tried again; nothing was lost", tenant)
}

func upperFirst(s string) string {
	if s == "" {
		return s
	}
	return strings.ToUpper(s[:1]) + s[1:]
}
