package nodeauthz

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
)

// refusing refuses with a reason until a time, and counts.
type refusing struct {
	authorizer.Authorizer // nil: there are no conditions to evaluate

	reason string
	until  time.Time
	asked  int
}

func (r *refusing) ConditionsAwareAuthorize(ctx context.Context, a authorizer.Attributes) authorizer.ConditionsAwareDecision {
	return authorizer.ConditionsAwareDecisionFromParts(r.Authorize(ctx, a))
}

func (r *refusing) Authorize(context.Context, authorizer.Attributes) (authorizer.Decision, string, error) {
	r.asked++
	if !time.Now().Before(r.until) {
		return authorizer.DecisionAllow, "", nil
	}
	return authorizer.DecisionNoOpinion, r.reason, errors.New("of the refusal")
}

const lags = `node: no relationship found between node "n" and this object`

func ask(ctx context.Context, r *refusing, resource string) (authorizer.Decision, string, error, time.Duration) {
	began := time.Now()
	d, reason, err := Patient(r).Authorize(ctx, authorizer.AttributesRecord{User: &user.DefaultInfo{Name: "system:node:n"}, Resource: resource, ResourceRequest: true})
	return d, reason, err, time.Since(began)
}

func TestAuthorizerCatchesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, resource := range []string{"serviceaccounts", "secrets", "configmaps"} {
			r := &refusing{reason: lags, until: time.Now().Add(40 * time.Millisecond)}
			d, _, err, took := ask(t.Context(), r, resource)
			if d != authorizer.DecisionAllow || err != nil || took > 80*time.Millisecond {
				t.Errorf("%s: %v, %v after %v", resource, d, err, took)
			}
			r.until = time.Now().Add(40 * time.Millisecond)
			if d := Patient(r).ConditionsAwareAuthorize(t.Context(), authorizer.AttributesRecord{Resource: resource}); !d.IsAllow() {
				t.Errorf("%s, with conditions: %v", resource, d)
			}
		}
	})
}

// TestRefused: what is refused stays so, after a quarter of a second and with the reason and the error of the last answer.
func TestRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &refusing{reason: lags, until: time.Now().Add(time.Hour)}
		d, reason, err, took := ask(t.Context(), r, "secrets")
		if d != authorizer.DecisionNoOpinion || reason != lags || err == nil || took < 200*time.Millisecond || took > 300*time.Millisecond || r.asked != 9 {
			t.Errorf("%v, %q, %v after %v and %d questions", d, reason, err, took, r.asked)
		}
	})
}

// TestRefusedAtOnce: there is nothing to wait for where it is not the node authorizer that lags.
func TestRefusedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		never := time.Now().Add(time.Hour)
		ended, end := context.WithCancel(t.Context())
		end()
		for name, c := range map[string]struct {
			ctx              context.Context
			reason, resource string
		}{
			"another reason":   {t.Context(), "RBAC: no", "secrets"},
			"a pod":            {t.Context(), lags, "pods"},
			"the client ended": {ended, lags, "secrets"},
		} {
			r := &refusing{reason: c.reason, until: never}
			if d, _, _, took := ask(c.ctx, r, c.resource); d != authorizer.DecisionNoOpinion || took != 0 || r.asked != 1 {
				t.Errorf("%s: %v after %v and %d questions", name, d, took, r.asked)
			}
		}
	})
}
