package mounter

import (
	"errors"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestNFSData(t *testing.T) {
	lookup := func(host string) (string, error) {
		switch host {
		case "nas.lan":
			return "192.0.2.7", nil
		case "192.0.2.8", "fd00::7":
			return host, nil
		}
		return "", errors.New("no such host")
	}
	all := func(before string) []string {
		var out []string
		for _, v := range nfsVersions {
			out = append(out, before+","+v)
		}
		return out
	}
	for _, c := range []struct {
		source, fstype, data string
		want                 []string
		wrong                bool
	}{
		{"nas.lan:/export", "nfs", "", all("addr=192.0.2.7"), false},
		{"192.0.2.8:/", "nfs", "hard,timeo=600", all("hard,timeo=600,addr=192.0.2.8"), false},
		{"[fd00::7]:/export", "nfs", "nfsvers=4.1", []string{"nfsvers=4.1,addr=fd00::7"}, false},
		{"nas.lan:/export", "nfs", "vers=3,nolock", []string{"vers=3,nolock,addr=192.0.2.7"}, false},
		{"nas.lan:/export", "nfs4", "soft", []string{"soft,addr=192.0.2.7"}, false},
		{"elsewhere:/export", "nfs", "addr=192.0.2.9,vers=4.2", []string{"addr=192.0.2.9,vers=4.2"}, false},
		{"elsewhere:/export", "nfs", "", nil, true},
		{"/export", "nfs", "", nil, true},
	} {
		got, err := nfsData(c.source, c.fstype, c.data, lookup)
		if !slices.Equal(got, c.want) || (err != nil) != c.wrong {
			t.Errorf("%s (%s, %q): %q, %v, want %q", c.source, c.fstype, c.data, got, err, c.want)
		}
	}
}

func TestNFSVersionsAreTried(t *testing.T) {
	for _, c := range []struct {
		refuse error
		tries  int
		want   error
	}{
		{nil, 1, nil},
		{unix.EPROTONOSUPPORT, len(nfsVersions), unix.EPROTONOSUPPORT},
		{unix.EACCES, 1, unix.EACCES}, // no other version would be let in
	} {
		tries := 0
		err := mountNFS("192.0.2.8:/export", "nfs", mountOptions{}, func(string) error {
			tries++
			return c.refuse
		})
		if tries != c.tries || !errors.Is(err, c.want) {
			t.Errorf("refused with %v: %d tries, %v", c.refuse, tries, err)
		}
	}
}
