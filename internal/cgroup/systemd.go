package cgroup

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"
)

// Slice is the name of the systemd slice for root. The kubelet derives the same name (ToSystemd
// in its cgroup manager): a dash separates levels, so a dash within a name becomes an
// underscore.
func Slice(root string) string {
	return strings.ReplaceAll(strings.Trim(root, "/"), "-", "_") + ".slice"
}

// EnsureSlice is Ensure on machines where systemd owns the tree: it requests a slice from
// systemd, with accounting for every controller.
func EnsureSlice(ctx context.Context, root string) error {
	c, err := dbus.NewSystemConnectionContext(ctx)
	if err != nil {
		return fmt.Errorf("ask systemd for slice %s: %w", Slice(root), err)
	}
	defer c.Close()
	on := func(name string) dbus.Property {
		return dbus.Property{Name: name, Value: godbus.MakeVariant(true)}
	}
	done := make(chan string, 1)
	_, err = c.StartTransientUnitContext(ctx, Slice(root), "replace", []dbus.Property{
		dbus.PropDescription("Pods of kedge"),
		{Name: "DefaultDependencies", Value: godbus.MakeVariant(false)},
		on("CPUAccounting"), on("MemoryAccounting"), on("IOAccounting"), on("TasksAccounting"),
	}, done)
	var already godbus.Error
	if errors.As(err, &already) && already.Name == "org.freedesktop.systemd1.UnitExists" {
		return ensureUnified("/" + Slice(root))
	}
	if err != nil {
		return fmt.Errorf("ask systemd for slice %s: %w", Slice(root), err)
	}
	select {
	case result := <-done:
		if result != "done" {
			return fmt.Errorf("ask systemd for slice %s: the job ended as %q", Slice(root), result)
		}
		// systemd delegates only the controllers that it knows, and the kubelet needs
		// hugetlb too if the kernel has it.
		return ensureUnified("/" + Slice(root))
	case <-ctx.Done():
		return ctx.Err()
	}
}

// RemoveSlice removes the slice that EnsureSlice made.
func RemoveSlice(ctx context.Context, root string) error {
	c, err := dbus.NewSystemConnectionContext(ctx)
	if err != nil {
		return fmt.Errorf("ask systemd to stop slice %s: %w", Slice(root), err)
	}
	defer c.Close()
	done := make(chan string, 1)
	_, err = c.StopUnitContext(ctx, Slice(root), "replace", done)
	var gone godbus.Error
	if errors.As(err, &gone) && gone.Name == "org.freedesktop.systemd1.NoSuchUnit" {
		return nil
	}
	if err != nil {
		return fmt.Errorf("ask systemd to stop slice %s: %w", Slice(root), err)
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
