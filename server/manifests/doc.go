// Package manifests applies the manifests of the installed bundle ("kedge install" from a bundle) to the cluster, with
// server-side apply.
//
// A manifest is applied once: what a user changes in its objects afterwards stays, until a bundle has another manifest. An
// object that cannot be created yet, because its namespace or its definition is missing, is tried again. Objects of earlier
// bundles are not deleted.
//
// It is not for static pods, which the kubelet reads itself, and does not know where bundles come from: package
// appliance/bundle writes the folder. Only package assembly imports it.
package manifests
