package joining

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

var someHash = strings.Repeat("ab", 32)

func TestNewTokensAreReadBack(t *testing.T) {
	a, b := NewToken(someHash), NewToken(someHash)
	if a.ID == b.ID || a.Secret == b.Secret {
		t.Fatal("two tokens are the same")
	}
	got, err := ParseToken(" " + a.Reveal() + "\n")
	if err != nil || got != a {
		t.Fatalf("read back %#v, %v; want %#v", got, err, a)
	}
	if !a.Secret.Matches(got.Secret.Hash()) || a.Secret.Matches(b.Secret.Hash()) || a.Secret.Matches("") {
		t.Error("the hash does not tell secrets apart")
	}
	if s := fmt.Sprintf("%v %+v %#v", a, a, a); strings.Contains(s, string(a.Secret)) {
		t.Errorf("the secret shows: %s", s)
	}
}

func TestParseToken(t *testing.T) {
	good := NewToken(someHash)
	for _, tc := range []struct {
		text string
		want string // part of the error; empty for none
	}{
		{good.Reveal(), ""},
		{"a secret with spaces", "printable"},
		{"a-secret-that-is-long-enough", ""},
		{"K1-is-how-this-one-begins", ""},
		{"K1" + someHash + "::preshared.a-secret.that-is-long", ""},
		{"", "empty"},
		{"short", "16 to 512 characters"},
		{"K1" + someHash + "::", "secret is missing"},
		{"K1" + someHash + "::0123456789", "secret is missing"},
		{"K1" + someHash + "::0123456789.", "secret is missing"},
		{"K1" + someHash + "::0123456789.abcd", "incomplete"},
		{"K1" + someHash + "::preshared.abcd", "16 to 512"},
		{"K1" + someHash + "::../../x.abcd", "invalid token name"},
		{"K1" + someHash[1:] + "::0123456789." + string(good.Secret), "hexadecimal"},
		{"K1" + strings.ToUpper(someHash) + "::0123456789." + string(good.Secret), "hexadecimal"},
		{"K1::0123456789." + string(good.Secret), "hexadecimal"},
		{"K10" + someHash + "::server:" + string(good.Secret), "hexadecimal"}, // k3s's
		{strings.Repeat("x", 2000), "too long"},
	} {
		_, err := ParseToken(tc.text)
		switch {
		case tc.want == "" && err != nil:
			t.Errorf("%q: %v", tc.text, err)
		case tc.want != "" && (!errors.Is(err, ErrTokenFormat) || !strings.Contains(err.Error(), tc.want)):
			t.Errorf("%q: got %v, want %q", tc.text, err, tc.want)
		}
	}
}

func FuzzParseToken(f *testing.F) {
	for _, s := range []string{NewToken(someHash).Reveal(), "K1" + someHash + "::preshared.0123456789abcdef", "0123456789abcdef", "K1::", "K1a::b.c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, err := ParseToken(text)
		if err != nil {
			if !errors.Is(err, ErrTokenFormat) {
				t.Errorf("%q: %v", text, err)
			}
			return
		}
		if again, err := ParseToken(got.Reveal()); err != nil || again != got {
			t.Errorf("%q: read back %#v, %v; want %#v", text, again, err, got)
		}
		if !ValidTokenID(got.ID) {
			t.Errorf("%q: id %q", text, got.ID)
		}
	})
}
