package settings

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"kedge/internal/errorkind"
)

// Value returns a setting with one value, which parse parses. In messages the text of parse's errors follows
// the setting's name, so it begins with a space or a colon.
func Value[T any](s Setting, parse func(text string) (T, error)) Of[T] {
	s.kind = single
	s.read = func(row *Setting, items []string) (any, []error) {
		var zero T
		if len(items) == 0 {
			return zero, nil
		}
		value, err := parse(items[len(items)-1])
		if err != nil {
			return zero, []error{errorkind.BadSetting(row.Name, "%w", err)}
		}
		return value, nil
	}
	return Of[T]{&s}
}

// List returns a setting with any number of items, each of which parse parses; commas separate items too.
func List[T any](s Setting, parse func(text string) (T, error)) Of[[]T] {
	s.kind, s.splits = list, true
	s.read = func(row *Setting, items []string) (any, []error) {
		var values []T
		var errs []error
		for _, item := range Split(items) {
			value, err := parse(item)
			if err != nil {
				errs = append(errs, errorkind.BadItem(row.Name, item, "%w", err))
				continue
			}
			values = append(values, value)
		}
		return values, errs
	}
	return Of[[]T]{&s}
}

// Text returns a setting whose value is any text.
func Text(s Setting) Of[string] {
	return Value(s, func(text string) (string, error) { return text, nil })
}

// Texts returns a setting with a list of texts without commas.
func Texts(s Setting) Of[[]string] {
	return List(s, func(text string) (string, error) { return text, nil })
}

// Verbatim returns a setting with a list of texts which may contain commas.
func Verbatim(s Setting) Of[[]string] {
	s.kind = list
	s.read = func(_ *Setting, items []string) (any, []error) { return items, nil }
	return Of[[]string]{&s}
}

// NotEmpty returns a setting whose value is a text that must not be empty.
func NotEmpty(s Setting) Of[string] {
	return Value(s, func(text string) (string, error) {
		if text == "" {
			return "", errors.New(" is empty")
		}
		return text, nil
	})
}

// OneOf returns a setting whose value is one of names, or empty if it has no default. Names in others are
// accepted too, and not shown.
func OneOf(s Setting, names []string, others ...string) Of[string] {
	return Value(s, func(text string) (string, error) {
		if text == "" && s.Default == "" || slices.Contains(names, text) || slices.Contains(others, text) {
			return text, nil
		}
		return "", fmt.Errorf(" %q must be one of %s%s", text, strings.Join(names, ", "), DidYouMean(text, names))
	})
}

// Switch returns a setting that is true or false; the flag alone means true.
func Switch(s Setting) Of[bool] {
	o := Value(s, func(text string) (bool, error) {
		value, err := strconv.ParseBool(text)
		if err != nil {
			return false, fmt.Errorf(": %q is neither true nor false", text)
		}
		return value, nil
	})
	o.kind = toggle
	return o
}

// Number returns a setting whose value is a whole number.
func Number(s Setting) Of[int] {
	return Value(s, number)
}

func number(text string) (int, error) {
	value, err := strconv.Atoi(text)
	if err != nil {
		return 0, fmt.Errorf(": %q is not a whole number", text)
	}
	return value, nil
}

// Port returns a setting whose value is a port number.
func Port(s Setting) Of[uint16] {
	return Value(s, func(text string) (uint16, error) {
		value, err := number(text)
		if err == nil && (value < 1 || value > 65535) {
			err = fmt.Errorf(" %d is not between 1 and 65535", value)
		}
		return uint16(value), err
	})
}

// Duration returns a setting whose value is a duration.
func Duration(s Setting) Of[time.Duration] {
	return Value(s, func(text string) (time.Duration, error) {
		value, err := time.ParseDuration(text)
		if err != nil {
			return 0, fmt.Errorf(": %q is not a duration such as 30s or 5m", text)
		}
		return value, nil
	})
}

// FileMode returns a setting whose value is an octal file mode.
func FileMode(s Setting) Of[uint32] {
	return Value(s, func(text string) (uint32, error) {
		value, err := strconv.ParseUint(text, 8, 12)
		if err != nil {
			return 0, fmt.Errorf(" %q is not an octal file mode such as 600", text)
		}
		return uint32(value), nil
	})
}

// Address returns a setting whose value is an IP address, or empty.
func Address(s Setting) Of[netip.Addr] {
	return Value(s, func(text string) (netip.Addr, error) {
		if text == "" {
			return netip.Addr{}, nil
		}
		return address(text)
	})
}

// Addresses returns a setting with a list of IP addresses.
func Addresses(s Setting) Of[[]netip.Addr] { return List(s, address) }

// onePerFamily refuses a second address of the same family.
func onePerFamily(of Of[[]netip.Addr]) Of[[]netip.Addr] {
	read := of.read
	of.read = func(row *Setting, items []string) (any, []error) {
		value, errs := read(row, items)
		addrs := value.([]netip.Addr)
		for i, a := range addrs {
			if before := slices.IndexFunc(addrs[:i], func(b netip.Addr) bool { return b.Is4() == a.Is4() }); before >= 0 {
				errs = append(errs, errorkind.BadItem(row.Name, a.String(), " %s is of the same family as %s; give at most one IPv4 and one IPv6", a, addrs[before]))
			}
		}
		return value, errs
	}
	return of
}

func address(text string) (netip.Addr, error) {
	a, err := netip.ParseAddr(text)
	if err != nil {
		return a, fmt.Errorf(" %q is not an IP address", text)
	}
	return a, nil
}

// Ranges returns a setting with a list of address ranges.
func Ranges(s Setting) Of[[]netip.Prefix] { return List(s, addressRange) }

func addressRange(text string) (netip.Prefix, error) {
	r, err := netip.ParsePrefix(text)
	if err != nil {
		return r, fmt.Errorf(" %q is not a range such as 10.42.0.0/16", text)
	}
	return r.Masked(), nil
}
