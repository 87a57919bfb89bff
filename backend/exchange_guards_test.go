package backend

import (
	"net/http"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/tokenservice"
)

// An assumed end of a refresh token that is over becomes unknown with an exchange that succeeds, and with no other.
func TestAssumedEndStaysUntilAnExchangeSucceeds(t *testing.T) {
	bubble(t, func(t *testing.T) {
		e := newOAuthEngine(t, func(o *oauth2test.Options) { o.Rotation = oauth2test.RotateNever }, map[string]any{"refresh_token_life": "10h", "keep_alive": "100h"})
		e.add("acme", nil)
		end := e.read("tenants/acme")["refresh_token_expire_time"]
		require.NotNil(t, end)
		e.index.stop() // no exchange without a request
		time.Sleep(11 * time.Hour)
		e.server.Inject(oauth2test.Fault{Answer: oauth2test.InvalidGrant, Times: 1})
		_, status, _ := e.try(logical.UpdateOperation, "tenants/acme/refresh", nil)
		require.Equal(t, http.StatusBadRequest, status)
		assert.Equal(t, end, e.read("tenants/acme")["refresh_token_expire_time"])
		e.write("tenants/acme/refresh", nil)
		assert.NotContains(t, e.read("tenants/acme"), "refresh_token_expire_time")
	})
}

// The address that a tenant was moved to is forgotten once it does not exist any more: the next exchange begins at the api root, also
// after a restart.
func TestMoveIsForgotten(t *testing.T) {
	for name, again := range map[string]func(*engine){
		"by an exchange that succeeds elsewhere": func(e *engine) {
			e.kaizala.Inject(kaizalatest.Fault{Status: http.StatusNotFound, Times: 1})
			_, _, _ = e.try(logical.UpdateOperation, "tenants/t0/refresh", nil)
			require.Nil(e.t, e.stored("t0").Move, "also where the exchange has failed")
			e.write("tenants/t0/refresh", nil)
		},
		"by a restart": func(e *engine) {
			e.kaizala.Inject(kaizalatest.Fault{Status: http.StatusNotFound, Times: 1})
			_, _, _ = e.try(logical.UpdateOperation, "tenants/t0/refresh", nil)
			e.restart()
			e.write("tenants/t0/refresh", nil)
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newConfiguredEngine(t)
				e.addTenants(1)
				e.kaizala.MoveUser("t0", "https://inc-001.osi.office.net")
				e.write("tenants/t0/refresh", nil)
				require.NotNil(t, e.stored("t0").Move)
				e.kaizala.MoveUser("t0", "")
				again(e)
				assert.Nil(t, e.stored("t0").Move)
			})
		})
	}
}

// Where an exchange ends no access token, a refresh cuts no lease short, and the tenant shows no warning of that.
func TestRefreshThatEndsNothingWarnsOfNothing(t *testing.T) {
	for name, c := range map[string]struct {
		fields map[string]any
		warns  bool
	}{"B": {classB, false}, "D": {classD, true}} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				e := newOAuthEngine(t, oauth2test.ClassD, c.fields)
				e.add("acme", nil)
				e.lease("acme")
				e.write("tenants/acme/refresh", nil)
				resp := e.ok(logical.ReadOperation, "tenants/acme", nil)
				assert.Equal(t, c.warns, len(resp.Warnings) > 0, resp.Warnings)
			})
		})
	}
}

// Trouble that came from storage alone ends when storage takes the next result, though that brings no access token; trouble that came
// from the service does not.
func TestTroubleOfStorageEndsWithStorage(t *testing.T) {
	of := map[string]error{"storage": storageTrouble("acme", errStorage), "service": &tokenservice.Failure{Kind: tokenservice.Unavailable}}
	for whose, err := range of {
		for _, exchanged := range []bool{false, true} {
			a := newTenant("acme")
			a.stored(&tenantEntry{}, nil, nil)
			a.failed(&trouble{err: err})
			ends, o := exchanged || whose == "storage", &outcome{}
			if exchanged {
				o.access = newAccessToken("acme", &accessEntry{})
			}
			assert.Equal(t, ends, a.stored(&tenantEntry{}, o, nil), "trouble of %s, exchanged %t", whose, exchanged)
			assert.Equal(t, ends, a.view.Load().trouble == nil)
		}
	}
}
