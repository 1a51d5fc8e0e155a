package cni

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"sync"

	"github.com/containernetworking/cni/pkg/types"

	"kedge/network/cniclient"
)

// encode returns a result in the version that the configuration requests.
func encode(result types.Result, version string) (json.RawMessage, error) {
	converted, err := result.GetAsVersion(cmp.Or(version, "1.0.0"))
	if err != nil {
		return nil, types.NewError(types.ErrIncompatibleCNIVersion, "convert the result", err.Error())
	}
	var buf bytes.Buffer
	if err := converted.PrintTo(&buf); err != nil {
		return nil, fmt.Errorf("write the result: %w", err)
	}
	return buf.Bytes(), nil
}

// failed returns an error in the form of the CNI specification.
func failed(version string, r cniclient.Request, err error) cniclient.Response {
	answer := struct {
		CNIVersion string `json:"cniVersion"`
		types.Error
	}{CNIVersion: cmp.Or(version, "1.0.0")}
	var known *types.Error
	if errors.As(err, &known) {
		answer.Error = *known
	} else {
		answer.Error = types.Error{Code: types.ErrInternal, Msg: err.Error(), Details: r.Command + " of " + owner(r.ContainerID, r.IfName)}
	}
	out, err := json.Marshal(answer)
	if err != nil {
		panic(err) // texts and a number always marshal
	}
	return cniclient.Response{Failed: true, Output: out}
}

// keyedMutex is a mutex for each key in use.
type keyedMutex struct {
	mu   sync.Mutex
	held map[string]*waiters
}

type waiters struct {
	mu    sync.Mutex
	count int // goroutines that hold it or wait for it; guarded by keyedMutex.mu
}

// lock locks the mutex of a key and returns the function that unlocks it.
func (k *keyedMutex) lock(key string) (unlock func()) {
	k.mu.Lock()
	if k.held == nil {
		k.held = map[string]*waiters{}
	}
	w := k.held[key]
	if w == nil {
		w = &waiters{}
		k.held[key] = w
	}
	w.count++
	k.mu.Unlock()
	w.mu.Lock()
	return func() {
		w.mu.Unlock()
		k.mu.Lock()
		defer k.mu.Unlock()
		if w.count--; w.count == 0 {
			delete(k.held, key)
		}
	}
}
