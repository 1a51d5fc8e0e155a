package datastore

import (
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestConfigDefaultsAreValid(t *testing.T) {
	if err := testConfig(t.TempDir()).Validate(); err != nil {
		t.Error(err)
	}
}

func TestConfigValidateReportsEverything(t *testing.T) {
	c := DefaultConfig()
	c.Dir = "relative"
	c.MemberName = ""
	c.Tick = 1500 * time.Microsecond
	c.Election = c.Tick
	c.Alone.BatchInterval = 0
	c.Alone.BatchLimit = -1
	c.Alone.SnapshotCount = 0
	c.Alone.SnapshotCatchUp = 0
	c.Quota = -1
	c.Defrag = DefragConfig{Interval: 0, MinSize: -1, MaxFree: 1.5, QuietRate: -1, Patience: -1}
	before := c

	err := c.Validate()
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{
		"absolute", "member name", "whole number of milliseconds", "five ticks", "batch interval", "batch limit",
		"snapshot count", "snapshot catch-up", "quota", "defragment interval", "minimum size", "free part",
		"quiet rate", "patience",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not reported in: %v", want, err)
		}
	}
	if !reflect.DeepEqual(c, before) {
		t.Error("Validate changed the config")
	}
}

func TestQuota(t *testing.T) {
	for _, tc := range []struct {
		name               string
		configured, volume int64
		want               int64
	}{
		{"a quarter of the volume", 0, 4 << 30, 1 << 30},
		{"no more than 2 GiB", 0, 1 << 40, 2 << 30},
		{"enough to live on a tiny volume", 0, 100 << 20, 64 << 20},
		{"as configured", 123, 1 << 40, 123},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := (Config{Quota: tc.configured}).quota(tc.volume); got != tc.want {
				t.Errorf("quota %d, want %d", got, tc.want)
			}
		})
	}
}
