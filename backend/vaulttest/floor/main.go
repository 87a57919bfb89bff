// Command floor is a plugin that only returns fixed answers. It shows the cost of a
// read with Vault, go-plugin and the SDK alone. make bench compares the engine with
// it; it is never installed.
package main

import (
	"context"
	"encoding/json"
	"log"
	"sync"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/plugin"
)

func main() {
	if err := plugin.ServeMultiplex(&plugin.ServeOpts{BackendFactoryFunc: factory}); err != nil {
		log.Fatal(err)
	}
}

func factory(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	b := &framework.Backend{
		BackendType:    logical.TypeLogical,
		RunningVersion: "v0.0.1",
		Paths:          []*framework.Path{constant("creds/"), constant("token/")},
		Secrets: []*framework.Secret{{
			Type: "kaizala_access_token", // the engine's type, so that answers have the same size
			Revoke: func(context.Context, *logical.Request, *framework.FieldData) (*logical.Response, error) {
				return nil, nil
			},
		}},
	}
	return b, b.Setup(ctx, conf)
}

// constant is a path of tenants. A read of a tenant returns the answer that was last
// written to it, a logical.Response as JSON. With Callbacks, unlike Operations, the
// framework does not ask for the replication state in a read, which would be a round
// trip to Vault.
func constant(prefix string) *framework.Path {
	var answers sync.Map // the answer of each tenant
	return &framework.Path{
		Pattern: prefix + framework.GenericNameRegex("tenant"),
		Fields: map[string]*framework.FieldSchema{
			"tenant":   {Type: framework.TypeString},
			"response": {Type: framework.TypeString},
		},
		//lint:ignore SA1019 Operations would add the framework's question, which the engine does not ask either
		Callbacks: map[logical.Operation]framework.OperationFunc{
			logical.ReadOperation: func(_ context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
				answer, _ := answers.Load(req.Path)
				next, _ := answer.(*logical.Response)
				return next, nil
			},
			logical.UpdateOperation: func(_ context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
				next := &logical.Response{}
				err := json.Unmarshal([]byte(d.Get("response").(string)), next)
				answers.Store(req.Path, next)
				return nil, err
			},
		},
	}
}
