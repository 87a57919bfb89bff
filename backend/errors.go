package backend

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// badValue is the answer to a request that must be changed before it can
// succeed.
func badValue(format string, args ...any) error {
	return logical.CodedError(http.StatusBadRequest, fmt.Sprintf(format, args...))
}

func notFound(format string, args ...any) error {
	return logical.CodedError(http.StatusNotFound, fmt.Sprintf(format, args...))
}

// tryAgain is the answer where nothing is wrong with the request.
func tryAgain(format string, args ...any) error {
	return logical.CodedError(http.StatusServiceUnavailable, fmt.Sprintf(format, args...))
}

func unknownTenant(name string) error {
	return badValue("there is no tenant %q: its tenant user has to write tenants/%s first", name, name)
}

func unknownConnector(name string) error {
	path := "config/" + name
	if name == defaultConnector {
		path = "config"
	}
	return badValue("connector %q is not configured: its owner has to write %s first", name, path)
}

// errStopping is the answer of an engine that Vault is shutting down.
var errStopping = tryAgain("the engine is stopping: try again in a moment; nothing was lost")

// answer turns an error into what Vault makes the right status of. Coded and
// read-only errors must be bare, and a 400 reads best as an error response.
func answer(err error) (*logical.Response, error) {
	var coded logical.HTTPCodedError
	switch {
	case errors.As(err, &coded) && coded.Code() == http.StatusBadRequest:
		return logical.ErrorResponse(coded.Error()), nil
	case errors.As(err, &coded):
		return nil, coded
	case errors.Is(err, context.DeadlineExceeded):
		return nil, tryAgain("Vault's storage has not answered in time: try again")
	}
	return nil, storageError(err)
}

// readerError says what the failure of a tenant's exchange means to whoever
// asked for it, and who has to do what.
func readerError(tenant, connector string, err error) error {
	var (
		failure *serviceError
		limit   *limitError
	)
	switch {
	case errors.Is(err, context.Canceled):
		return errStopping
	case errors.As(err, &limit) && limit.byService:
		return tooMany(limit.until, "Kaizala has refused further calls of connector %q", connector)
	case errors.As(err, &limit):
		return tooMany(limit.until, "the share of calls of connector %q, or tenant %q's fifth of it, is used up", connector, tenant)
	case !errors.As(err, &failure):
		return err
	}
	switch failure.kind {
	case refusedRefreshToken:
		return badValue("Kaizala refuses the refresh token of tenant %q: its tenant user has to generate a new one on Kaizala's portal and write it to tenants/%s", tenant, tenant)
	case refusedConnector:
		return badValue("Kaizala refuses connector %q: its owner has to write the right connector_id and connector_secret to config/%s; no refresh token was lost", connector, connector)
	case refused:
		return badValue("Kaizala refused the exchange for tenant %q without saying whether the refresh token or connector %q is wrong (%s): check both", tenant, connector, failure.text)
	case limited:
		return tooMany(time.Now().Add(retryAfter(failure)), "Kaizala has refused further calls of connector %q", connector)
	default:
		return tryAgain("no access token for tenant %q, but nothing was lost: %s", tenant, failure.text)
	}
}

func tooMany(until time.Time, format string, args ...any) error {
	wait := time.Until(until).Round(time.Second)
	text := fmt.Sprintf(format, args...)
	return logical.CodedError(http.StatusTooManyRequests,
		fmt.Sprintf("%s: come back in %s, at %s", text, max(wait, time.Second), until.UTC().Format(time.RFC3339)))
}

// retryAfter is how long a limited connector rests: Kaizala counts by the
// minute, where it names no time.
func retryAfter(e *serviceError) time.Duration {
	if e.retryAfter > 0 {
		return e.retryAfter
	}
	return window
}
