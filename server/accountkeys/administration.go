package accountkeys

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"kedge/internal/control"
	"kedge/server/peerrequests"
)

// Administration is how an administrator replaces the key, on any server.
type Administration struct {
	own     *Keeper
	peers   peers
	cluster Cluster
	secrets func(ctx context.Context, of []string) ([]string, error) // Secrets with tokens of keys
	now     func() time.Time
}

// NewAdministration returns the administration on the server whose keeper is own. api reads Secrets.
func NewAdministration(own *Keeper, client *Client, cluster Cluster, api kubernetes.Interface) *Administration {
	return &Administration{own: own, peers: client, cluster: cluster, now: time.Now, secrets: func(ctx context.Context, of []string) ([]string, error) {
		return tokenSecrets(ctx, api, of)
	}}
}

// MaxPublish is the longest time for which a new key may be published before it signs.
const MaxPublish = 7 * 24 * time.Hour

// Begin begins a change, which the server that leads carries out. The new key is published for the given time before it signs.
func (a *Administration) Begin(ctx context.Context, publish time.Duration) error {
	if publish < 0 || publish > MaxPublish {
		return fmt.Errorf("the new key can be published for up to %s before it signs, not for %s", MaxPublish, publish)
	}
	if s := a.own.state(); s.Foreign != "" {
		return errors.New(s.Foreign)
	}
	own, err := a.own.keys()
	if err != nil {
		return err
	}
	s, err := a.own.open()
	if err != nil {
		return err
	}
	defer s.Close()
	before, revision, err := readRecord(ctx, s)
	if err != nil {
		return err
	}
	r, err := begin(before, ids(own), publish, a.now())
	if err != nil {
		return err
	}
	if _, err := writeRecord(ctx, s, r, revision); err != nil {
		if errors.Is(err, errChanged) {
			err = errUnderway
		}
		return err
	}
	a.own.log.Info("a change of the key of service accounts' tokens begins", "publish", publish)
	return nil
}

// Times after which nobody should need the old key any more.
const (
	// renewedWithin: kubelets replace the tokens of pods when four fifths of their life are over, and after a day at most.
	renewedWithin = 24 * time.Hour
	// unusedFor: the default life of a token of a pod.
	unusedFor = time.Hour
)

// Finish ends a change: the old key is forgotten. Without force it refuses that while the old key is in use.
func (a *Administration) Finish(ctx context.Context, force bool) error {
	s, err := a.own.open()
	if err != nil {
		return err
	}
	defer s.Close()
	r, revision, err := readRecord(ctx, s)
	if err != nil {
		return err
	}
	switch {
	case r == nil || r.Stage == None:
		return errors.New("the key of service accounts' tokens is not being replaced; \"kedge service-account-key rotate\" begins it")
	case r.Stage == Drop:
		return nil
	case r.Stage != Keep:
		return errors.New("not all servers sign with the new key yet; \"kedge service-account-key status\" shows for which the change waits")
	}
	if !force {
		if err := a.unused(ctx, r); err != nil {
			return fmt.Errorf("%w; --force forgets the old key all the same", err)
		}
	}
	r.next(a.now())
	if _, err := writeRecord(ctx, s, r, revision); err != nil {
		return err
	}
	a.own.log.Info("the change of the key of service accounts' tokens is being finished", "force", force)
	return nil
}

// unused returns nil if nobody seems to need the old key of a change.
func (a *Administration) unused(ctx context.Context, r *record) error {
	names, err := a.secrets(ctx, r.old())
	if err != nil {
		return err
	}
	if n := len(names); n > 0 {
		more := ""
		if n > 5 {
			names, more = names[:5], " and others"
		}
		return fmt.Errorf("%d Secrets have tokens of the old key, which would not be accepted any more: %s%s; remove \"token\" from their data, and they get new ones", n, strings.Join(names, ", "), more)
	}
	now := a.now()
	if from := r.Switched.Add(renewedWithin); now.Before(from) {
		return fmt.Errorf("pods may have tokens of the old key until %s, a day after the switch", from.Format(time.RFC3339))
	}
	for _, s := range a.servers(ctx) {
		if s.state.Name == "" {
			return fmt.Errorf("server %s cannot say whether the old key is in use: %s", s.name, s.problem)
		}
		for _, id := range r.old() {
			if at := s.state.Used[id]; now.Sub(at) < unusedFor {
				return fmt.Errorf("a token of the old key was shown to server %s at %s; find out who has it, or try again when that is an hour ago", s.name, at.Format(time.RFC3339))
			}
		}
	}
	return nil
}

// Status returns how far a change is, and what each server has. It asks all servers.
func (a *Administration) Status(ctx context.Context) (control.AccountKeys, error) {
	own := a.own.state()
	st := control.AccountKeys{Foreign: own.Foreign}
	r, err := a.own.read(ctx)
	if err != nil {
		return st, err
	}
	wanted := own.Loaded
	if r != nil {
		wanted = r.wanted()
		st.Stage, st.Waits, st.Began, st.Switched, st.Ended = string(r.Stage), r.Waits, r.Began, r.Switched, r.Ended
		if r.Stage != None {
			st.Old = r.old()
			if st.Secrets, err = a.secrets(ctx, st.Old); err != nil {
				return st, err
			}
		}
		if r.Stage == Keep {
			st.FinishFrom = r.Switched.Add(renewedWithin)
		}
	}
	if len(wanted) > 0 {
		st.Signs = wanted[0]
	}
	st.Servers = []control.AccountKeysServer{}
	for _, s := range a.servers(ctx) {
		shown := control.AccountKeysServer{Name: s.name, Keys: s.state.Loaded, Problem: s.problem, Current: s.problem == "" && slices.Equal(s.state.Loaded, wanted)}
		for _, id := range st.Old {
			if at := s.state.Used[id]; at.After(shown.OldUsed) {
				shown.OldUsed = at
			}
		}
		st.Servers = append(st.Servers, shown)
	}
	return st, nil
}

// server is what is known of a server.
type server struct {
	name    string
	state   state // without a name: it has not answered
	problem string
}

// servers asks all servers what they have.
func (a *Administration) servers(ctx context.Context) []server {
	apis := a.cluster.APIs()
	members, err := a.cluster.Members(ctx)
	if err != nil { // one that has not started is shown by those that have
		members = slices.Collect(maps.Keys(apis))
	}
	slices.Sort(members)
	out := make([]server, len(members))
	var group sync.WaitGroup
	for i, name := range members {
		group.Go(func() {
			has, err := state{}, error(nil)
			if api, known := apis[name]; name == a.own.name {
				has = a.own.state()
			} else if !known {
				err = errors.New("its API is not known yet")
			} else {
				has, err = a.peers.state(ctx, peerrequests.Address{Name: name, API: api})
			}
			out[i] = server{name: name, state: has, problem: has.Foreign}
			if err != nil {
				out[i] = server{name: name, problem: err.Error()}
			}
		})
	}
	group.Wait()
	return out
}

// tokenSecrets returns the names, NAMESPACE/NAME, of the Secrets that have a token of one of the keys.
func tokenSecrets(ctx context.Context, api kubernetes.Interface, of []string) ([]string, error) {
	list, err := api.CoreV1().Secrets(metav1.NamespaceAll).List(ctx, metav1.ListOptions{FieldSelector: "type=" + string(corev1.SecretTypeServiceAccountToken)})
	if err != nil {
		return nil, fmt.Errorf("look for Secrets with tokens of the old key: %w", err)
	}
	names := []string{}
	for _, s := range list.Items {
		if id := keyOf(string(s.Data[corev1.ServiceAccountTokenKey])); slices.Contains(of, id) {
			names = append(names, s.Namespace+"/"+s.Name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// keyOf returns the ID of the key that has signed a token; empty if it does not say.
func keyOf(token string) string {
	first, _, _ := strings.Cut(token, ".")
	data, err := base64.RawURLEncoding.DecodeString(first)
	if err != nil {
		return ""
	}
	var header struct {
		Key string `json:"kid"`
	}
	if json.Unmarshal(data, &header) != nil {
		return ""
	}
	return header.Key
}
