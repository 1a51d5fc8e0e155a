package settings

import (
	"fmt"
	"strings"
)

// DidYouMean returns the question for the nearest of names, or "" if none is close.
func DidYouMean(name string, names []string) string {
	if best := Nearest(name, names); best != "" {
		return fmt.Sprintf("; did you mean %q?", best)
	}
	return ""
}

// Nearest returns the name in names that is nearest to name, or "" if none is close.
func Nearest(name string, names []string) string {
	name = strings.ToLower(strings.ReplaceAll(name, "_", "-"))
	best, bestDistance := "", max(2, len(name)/3)+1
	for _, n := range names {
		// Two short names have few letters in common by chance.
		if d := distance(name, n); d < bestDistance && 2*d <= max(len(name), len(n)) {
			best, bestDistance = n, d
		}
	}
	return best
}

// distance returns the number of letters that must be inserted, deleted, replaced or swapped with their
// neighbour to turn b into a (optimal string alignment).
func distance(a, b string) int {
	before, last := make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row := make([]int, len(b)+1)
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last = last, row
	}
	return last[len(b)]
}
