output "mount" {
  description = "Path of the mount."
  value       = vault_mount.kaizala.path
}

output "policies" {
  description = "Names of the policies."
  value       = sort(keys(vault_policy.kaizala))
}

output "role_ids" {
  description = "AppRole role IDs by tenant."
  value       = { for tenant, role in vault_approle_auth_backend_role.app : tenant => role.role_id }
}
