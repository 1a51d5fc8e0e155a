package custom

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"kedge/dns/message"
	"kedge/dns/outside"
)

// Keys of the ConfigMap.
const (
	StubZones = "stub-zones"
	Hosts     = "hosts"
	Rewrites  = "rewrites"
)

// Rules is the content of a ConfigMap. It is immutable after Parse.
type Rules struct {
	Stubs   []outside.Stub
	hosts   map[string][]netip.Addr // by wire name; addresses in the order of the file
	reverse map[netip.Addr]string
	exact   map[string]string // wire name to wire name
	below   map[string]string // the same for all names below
}

// Empty reports whether there are neither hosts nor rewrites.
func (r *Rules) Empty() bool { return len(r.hosts) == 0 && len(r.exact) == 0 && len(r.below) == 0 }

// Mistake is an error in a line.
type Mistake struct {
	Key  string
	Line int // from 1; 0 for the whole key
	Err  error
}

// Error implements error.
func (m Mistake) Error() string {
	if m.Line == 0 {
		return fmt.Sprintf("%s: %v", m.Key, m.Err)
	}
	return fmt.Sprintf("%s, line %d: %v", m.Key, m.Line, m.Err)
}

// Unwrap returns the error in the line.
func (m Mistake) Unwrap() error { return m.Err }

// Parse parses the data of a ConfigMap. Its errors are Mistakes, joined. Names below the
// cluster domain cannot be given to another server; own are the addresses of this resolver.
func Parse(data map[string]string, domain string, own []netip.Addr) (*Rules, error) {
	r := &Rules{hosts: map[string][]netip.Addr{}, reverse: map[netip.Addr]string{}, exact: map[string]string{}, below: map[string]string{}}
	parsers := map[string]func([]string) error{
		StubZones: func(f []string) error { return r.stub(f, message.WireName(domain), own) },
		Hosts:     r.host,
		Rewrites:  r.rewrite,
	}
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(data)) {
		parse := parsers[key]
		if parse == nil {
			errs = append(errs, Mistake{Key: key, Err: fmt.Errorf("unknown key; the keys are %s, %s and %s", Hosts, Rewrites, StubZones)})
			continue
		}
		n := 0
		for line := range strings.Lines(data[key]) {
			n++
			line, _, _ = strings.Cut(line, "#")
			fields := strings.Fields(line)
			if len(fields) == 0 {
				continue
			}
			if err := parse(fields); err != nil {
				errs = append(errs, Mistake{Key: key, Line: n, Err: err})
			}
		}
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return r, nil
}

func wireName(s string) (string, error) {
	w := message.WireName(s)
	if len(w) <= 1 {
		return "", fmt.Errorf("%q is not a name", s)
	}
	return w, nil
}

func (r *Rules) stub(f []string, domain string, own []netip.Addr) error {
	zone, err := wireName(f[0])
	if err != nil {
		return err
	}
	if strings.HasSuffix(zone, domain) {
		return fmt.Errorf("%s is the cluster domain or below it", f[0])
	}
	if slices.ContainsFunc(r.Stubs, func(s outside.Stub) bool { return s.Zone == zone }) {
		return fmt.Errorf("%s is defined twice", f[0])
	}
	if len(f) == 1 {
		return fmt.Errorf("%s has no name servers", f[0])
	}
	s := outside.Stub{Zone: zone}
	for _, text := range f[1:] {
		to, err := netip.ParseAddrPort(text)
		if err != nil {
			a, err := netip.ParseAddr(text)
			if err != nil {
				return fmt.Errorf("%q is not an IP address, with or without a port", text)
			}
			to = netip.AddrPortFrom(a, 53)
		}
		if slices.Contains(own, to.Addr()) && to.Port() == 53 {
			return fmt.Errorf("%s is the cluster DNS address", to.Addr())
		}
		s.Servers = append(s.Servers, to)
	}
	r.Stubs = append(r.Stubs, s)
	return nil
}

func (r *Rules) host(f []string) error {
	a, err := netip.ParseAddr(f[0])
	if err != nil || a.Zone() != "" {
		return fmt.Errorf("%q is not an address", f[0])
	}
	a = a.Unmap()
	if len(f) == 1 {
		return fmt.Errorf("%s has no names", f[0])
	}
	for i, text := range f[1:] {
		name, err := wireName(text)
		if err != nil {
			return err
		}
		if !slices.Contains(r.hosts[name], a) {
			r.hosts[name] = append(r.hosts[name], a)
		}
		if _, ok := r.reverse[a]; i == 0 && !ok {
			r.reverse[a] = name
		}
	}
	return nil
}

func (r *Rules) rewrite(f []string) error {
	if len(f) != 2 {
		return errors.New("expected two names: the name in the query and the name to resolve instead")
	}
	from, below := strings.CutPrefix(f[0], "*.")
	to, alsoBelow := strings.CutPrefix(f[1], "*.")
	if below != alsoBelow {
		return errors.New("either both names begin with \"*.\" or neither does")
	}
	a, err := wireName(from)
	if err != nil {
		return err
	}
	b, err := wireName(to)
	if err != nil {
		return err
	}
	rules := r.exact
	if below {
		rules = r.below
	}
	if _, ok := rules[a]; ok {
		return fmt.Errorf("%s is defined twice", f[0])
	}
	if a == b || below && strings.HasSuffix(b, a) {
		return fmt.Errorf("%s would be rewritten in a loop", f[0])
	}
	rules[a] = b
	return nil
}

// Host returns the addresses of a name, and whether the name is defined.
func (r *Rules) Host(q *message.Query) ([]netip.Addr, bool) {
	addrs, ok := r.hosts[string(q.Name())]
	return addrs, ok
}

// Pointer returns the first name of an address, in wire format.
func (r *Rules) Pointer(a netip.Addr) (string, bool) {
	name, ok := r.reverse[a]
	return name, ok
}

// Rewrite returns the target of a name, in wire format. The rule with the longest match
// applies. If the new name is too long, there is none.
func (r *Rules) Rewrite(q *message.Query) (string, bool) {
	if to, ok := r.exact[string(q.Name())]; ok {
		return to, true
	}
	if len(r.below) == 0 {
		return "", false
	}
	for i := 1; i < q.Labels(); i++ {
		rest := q.From(i)
		if to, ok := r.below[string(rest)]; ok {
			name := q.Name()
			to = string(name[:len(name)-len(rest)]) + to
			return to, len(to) <= 255
		}
	}
	return "", false
}
